"""What other commands left in folders: found, read strictly, and put into rows."""
