"""The names of a mesh's axes, for what runs on one and for what makes one."""

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # over which the images of a batch are divided
