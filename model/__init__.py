"""Networks, losses, metrics, and what a run is made of. Most of it knows nothing of shards.

Modules:
    networks     architecture name → torch module over one-channel images; weights to start from
    losses       logits, targets, masks → scalar (cross-entropy, AUC margin); logits → scores
    augment      uint8 batch → float batch, normalised and randomly transformed, on the batch's device
    optim        network → optimiser; step → learning rate; the running average of weights
    checkpoint   state dict ↔ file, atomically and without unpickling code; random state
    evaluation   network + batches → scores
    metrics      scores, targets, masks → AUROC, AUPRC, Brier score, calibration error, rates at thresholds
    calibration  dev's scores → temperatures and thresholds
    bootstrap    scores → figures of resamples of patients, and intervals
    assessment   all of these → the evaluation of a split, as one JSON document
    report       evaluations → an HTML page and a model card
    export       network → ONNX or torch.export
    run          what a run is: configuration, folder, device, the rows of the shards that it uses
    scoring      a trained run → scores and evaluation of a split, or of image files
"""
