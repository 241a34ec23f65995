"""The command line: each verb in the module that is imported when it is typed."""
