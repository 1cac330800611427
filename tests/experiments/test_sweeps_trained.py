import matplotlib.pyplot as plt
import torch
from cases import rand, small_cnn

from rgap.experiments import plots, sweeps


def test_every_victim_is_attacked_before_training_and_after_each_epoch():
    images, labels = rand(8, 3, 8, 8).float(), torch.arange(8) % 2
    runs = sweeps.trained_attacks(small_cnn().float(), images, labels, images[:2], labels[:2], epochs=2, batch_size=4)
    assert runs[["epoch", "image"]].to_numpy().tolist() == [[e, i] for e in range(3) for i in range(2)]
    assert runs["loss"].nunique() == 3 and (runs["psnr_best_db"] >= runs["psnr_db"]).all()
    assert (runs["psnr_best_db"] > 60).all() and runs["label_found"].all()
    assert (runs[["gradient_norm", "condition"]] > 0).all(axis=None) and (runs["twins"] >= 1).all()
    figure = plots.trained(runs)
    assert [len(axis.get_lines()) > 0 for axis in figure.axes] == [True] * 4
    assert figure.axes[1].get_yscale() == "log" and figure.axes[3].get_legend() is not None
    plt.close(figure)
