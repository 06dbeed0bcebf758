"""The command line: parsing and printing around one call of `relex_stream.api` per command.

The only place for click, rich and printing. Command files import the library inside the command
function, so that ``--help`` and shell completion load nothing heavy.
"""
