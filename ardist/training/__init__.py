"""Training: the loop, the DeepSpeed engine, layout-free checkpoints, sharded EMA, callbacks, tracking."""
