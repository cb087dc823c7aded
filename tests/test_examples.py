"""The examples do what they say, in small."""

from benchmarks.examples import average_three, distillation, ensemble, language_model, own_cnn


def test_a_geodesic_between_networks_of_ones_own_is_below_the_line():
    highest = own_cnn.main(epochs=4, steps=30)
    assert highest["geodesic"] < highest["matched line"] < highest["line"]


def test_three_networks_are_averaged_in_one_frame():
    found = average_three.main(epochs=4, width=0.5)
    assert found["worst of the three"] > 0.8
    assert found["mean in one frame"] > found["mean as they are"] + 0.1


def test_a_language_model_moves_along_its_path():
    energies = language_model.main(steps=12)
    assert energies[-1] < 0.9 * energies[0]


def test_a_student_learns_from_its_teacher_without_labels():
    found = distillation.main(epochs=4)
    assert found["teacher"] > 0.9 and found["student"] > 0.85


def test_an_ensemble_is_no_worse_than_its_members():
    found = ensemble.main(epochs=3)
    assert found["ensemble"] >= found["members"] > 0.7
