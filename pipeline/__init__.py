"""CheXpert CSVs and images → label table → shards → stream of batches. Knows nothing of models.

Modules, in the order the data flows:
    labels    CSV → label table (Arrow), policies for uncertain and blank, patient split
    source    a CheXpert folder, as people have it → label table per split, and where each image lies
    images    image file → what is stored, without metadata → uint8 array
    tar       tar members: the header written, and a strict walk over any tar
    workers   tasks → results, in processes that may be killed
    cluster   the same on a Dask cluster
    store     output folders in an object store
    shards    source + options → tar shards, Arrow index, manifest
    preview   source + options → what that would give, without writing
    manifest  what a folder of shards says of itself, read back and checked
    select    conditions on the table → rows; weights that balance a label
    plan      (shard sizes, seed, epoch) → the order of the epoch's samples
    remote    shards at a URL → local files, through a bounded cache
    stream    order → batches of images, targets and masks
    studies   table → studies, and batches of these instead of images
    verify    shards → what is wrong with them
    index     shards that others wrote → Arrow index and manifest
    scores    a run's scores of a split ↔ Arrow file
    stats     label table → counts, groups, co-occurrence, policies, drift
    plots     counts → figures
    show      shards → a contact sheet of their images, with labels
    pages     what all pages share: layout, style sheet, figures as SVG
    label_report  counts and example images → a page
    films     anatomy and findings → a synthetic chest film
    sample    a synthetic CheXpert of such films, for the first run and the tests
    console   exit codes and progress bars
    cli       the `pipeline` command: parse, call, print
"""


class DataError(Exception):
    """Input that cannot be used; the message names the file, row, column or option and says what to do."""
