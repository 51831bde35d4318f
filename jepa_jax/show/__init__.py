"""Pictures of what a checkpoint has learned, with the numbers behind them: python -m jepa_jax show NAME."""
