"""Mathematics as plain functions of arrays. Nothing here knows about modules or parameters."""
