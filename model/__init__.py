"""Networks, losses, metrics, and what a run is made of. Most of it knows nothing of shards.

Modules:
    ranks        torchrun's processes → one's share of a batch, and what all agree on
    networks     architecture name → torch module over one-channel images; weights to start from
    fusion       the views of a study → its logits, by one backbone
    losses       logits, targets, masks → scalar (cross-entropy, AUC margin); logits → scores
    augment      uint8 batch → float batch, normalised and randomly transformed, on the batch's device
    optim        network → optimiser; step → learning rate; the running average of weights
    checkpoint   state dict ↔ file, atomically and without unpickling code; random state
    evaluation   network + batches → scores
    metrics      scores, targets, masks → AUROC, AUPRC, Brier score, calibration error, rates at thresholds
    calibration  dev's scores → calibrations and thresholds
    delong       scores → intervals of AUROC, its means and differences, patients as clusters
    bootstrap    scores → intervals of AUPRC, from resamples of patients
    assessment   all of these → the evaluation of a split, as one JSON document
    comparison   scores of the same studies by several methods → differences
    report       evaluations → an HTML page and a model card
    export       network → ONNX or torch.export
    sweep        values of parameters → trials, shared by processes through Optuna
    sweep_report trials → sweep.csv, report.html, contour plots
    run          what a run is: configuration, folder, device, the rows of the shards that it uses
    overlap      what a run trained on → patients and images that another set shares with it
    scoring      a trained run → scores and evaluation of a split, or of image files
"""
