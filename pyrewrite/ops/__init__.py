"""The backend: torch operators over the package's own kernels, each with its plain-torch reference."""
