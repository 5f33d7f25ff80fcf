"""What is run on the repository, not shipped with the package."""
