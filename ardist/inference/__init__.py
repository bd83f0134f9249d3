"""From weights to video: the asynchronous sampler with its exact cache, bundles, and video files."""
