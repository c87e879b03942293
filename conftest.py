"""What pytest leaves alone: kernels import Triton, which is not installed beside torch for a processor."""

collect_ignore = ["funcprobe/engine/attention_triton.py", "funcprobe/engine/attention_lines.py"]
