"""Run the command line as ``python -m relex_stream``."""

from relex_stream.cli.main import main

if __name__ == "__main__":
    main()
