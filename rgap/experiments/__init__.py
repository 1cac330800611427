"""The experiments behind the notebooks: what each one measures, with the true images at hand, and how it draws it."""
