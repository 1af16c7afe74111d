"""The command line, its work on files, the demo and the page in the browser."""
