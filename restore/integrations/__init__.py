"""The package's methods as parts of other libraries; each module needs the library of its name."""
