"""MMEB-V2's 78 tasks from their official layout on disk to a leaderboard file; knows no training.

`tasks` says what they are, `loaders` reads them, `encoding` embeds them, `scoring` scores them,
`score_files` keeps and averages the results, `runner` does it all.
"""
