"""Pictures and pages, each a function of a record."""
