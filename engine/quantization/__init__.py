"""Weight formats at run time, one class each, and the meaning of ``quantization_config``."""
