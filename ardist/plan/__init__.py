"""What a run will need and take, before anything is started: parameters, FLOPs, memory, speed, days, data rate."""
