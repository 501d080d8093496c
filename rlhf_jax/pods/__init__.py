"""Planning for TPU pods: memory, FLOPs, traffic, time and cost of a stage, from programs compiled without a pod."""
