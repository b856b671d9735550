"""Multi-token prediction heads with self-distillation (MTP-D) and looped extension, on Megatron-Core.

Importing this costs nothing: torch and Megatron are imported by the modules that need them. Where there is no
GPU, `megatron_mtpd.platform` comes first.
"""

__version__ = "0.1.0"
