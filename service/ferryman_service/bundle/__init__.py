"""Model bundles: a folder with a manifest and the files it names, as training leaves it and serving takes it."""
