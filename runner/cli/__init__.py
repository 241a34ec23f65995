"""The command line. The module of a verb is imported when the verb is typed."""
