"""finetune: from a short recipe to an adapter that is proven to work."""

__version__ = "0.1.0"
