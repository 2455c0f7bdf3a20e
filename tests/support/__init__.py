"""What test files share.  errors: how far results are from what is wanted."""
