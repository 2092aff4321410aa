"""The machinery below the scripts: one module for each question. Nothing here imports a script."""
