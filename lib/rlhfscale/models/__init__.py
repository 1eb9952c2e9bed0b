"""Models: loading and training them, faster layers for CPUs, and several processes.

loading.py, lm.py, optim.py              load in fp32, bf16 or NF4; train a language model; Muon
llama.py, llama_layer.py, lora.py        decoders and LoRA layers that are faster on a CPU; allocator.py
recomputation.py                         gradient checkpointing
sequences.py, documents.py, packing.py   token sequences, and what is computed together
parallel.py, sharding.py                 training on several processes
checkpoints.py, shapes.py, smollm2.py    published models; files.py
"""
