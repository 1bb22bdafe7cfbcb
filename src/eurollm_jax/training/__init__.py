"""The train step, what it optimizes with, and the loop that runs, saves and resumes it."""
