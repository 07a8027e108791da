"""The flags of the commands, as decorators."""
