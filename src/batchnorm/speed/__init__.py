"""The layers beside torch's, on this machine: seconds side by side, and what memory allows."""
