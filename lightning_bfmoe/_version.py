"""The one place that states the version; the build backend reads it from here too."""

__version__ = "0.1.0"
