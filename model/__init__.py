"""Networks, loss, augmentation, metrics, checkpoints and evaluation. Knows nothing of tars.

Modules:
    networks    architecture name → torch module over one-channel images
    losses      logits, targets, masks → scalar; logits → scores
    augment     uint8 batch → float batch, normalised and randomly transformed, on the batch's device
    metrics     scores, targets, masks → AUROC per label and its means
    evaluation  model + batches → scores, and the report written beside a run
    checkpoint  state dict ↔ file, atomically and without unpickling code
"""
