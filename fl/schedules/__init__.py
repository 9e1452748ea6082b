"""Schedules: who starts when, and who is heard when. One file a schedule."""
