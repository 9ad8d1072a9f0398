"""Real text: the nouns of WordNet as a reverse dictionary; knows no model."""
