"""What a training run will need of a pod, found before the pod is rented."""
