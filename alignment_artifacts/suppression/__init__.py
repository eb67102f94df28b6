"""The library, the search for a setting, and transcripts before and after."""
