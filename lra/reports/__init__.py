"""What people read: leaderboard, tables, charts, the HTML report, the comparison of two runs."""
