"""Output for readers: leaderboard, tables, charts, the HTML report, the comparison of two runs."""
