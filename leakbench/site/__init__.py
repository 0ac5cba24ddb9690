"""The leaderboard as a folder of static pages: rows in, HTML out. No torch here, no network, no server."""
