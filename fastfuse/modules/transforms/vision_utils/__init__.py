"""torchtune's import paths for the geometry of images in fastfuse.data."""
