"""Build and fit: data module, Lightning module, command line."""
