"""MMEB-V2's 78 tasks from their official layout on disk to a leaderboard file.

`tasks` says what they are, `task_files` where they lie, `loaders` reads them, `encoding` embeds
them, `score_task` scores one, `leaderboard` keeps and averages the scores, `run_tasks` does it all.
"""
