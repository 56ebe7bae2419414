"""What all rewards have in common: options, devices, prompts that are checked, videos frame by frame,
weights and several at once.
"""

import pytest
import torch

from engine_cases import error_line, flowgrove, metrics_of, refuse, succeed, tiny_recipe
from flowgrove.rewards import registry
from flowgrove.rewards.jpeg_size import JpegSizeReward
from planner_cases import user_error
from policy_cases import small_recipe
from reward_cases import clip_folder, pictures, reward_of, rewards_of, serving

SENTENCES = ["a red circle at the centre", "a blue square at the top left"]


class Brightness:
    """Notes what it is given."""

    def __init__(self, device: torch.device, scale: float = 1.0, checked: bool = False) -> None:
        self.device, self.scale, self.given = device, scale, []

    def __call__(self, pictures, prompts):
        self.given.append((tuple(pictures.shape), list(prompts)))
        return self.scale * pictures.mean((1, 2, 3))


class WholeVideos(Brightness):
    takes_video = True

    def __call__(self, pictures, prompts):
        self.given.append((tuple(pictures.shape), list(prompts)))
        return pictures.flatten(1).amax(1)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(registry._REWARDS, "brightness", Brightness)
    monkeypatch.setitem(registry._REWARDS, "whole", WholeVideos)


def test_all_rewards_of_the_design_are_there():
    assert set(registry._REWARDS) >= {
        "shapes", "hpsv2", "pickscore", "image_reward", "clip_score", "aesthetic", "unified_reward", "jpeg_size",
        "http", "python",
    }  # fmt: skip


def test_a_reward_is_told_the_device_of_the_run():
    assert rewards_of({"name": "brightness"}, device="meta").scorers["brightness"].device == torch.device("meta")
    assert reward_of(name="brightness").device == torch.device("cpu")


@pytest.mark.parametrize("name", ["brightness", "shapes", "clip_score", "http"])
def test_the_device_is_no_option_of_a_reward(name):
    assert "device" in user_error(rewards_of, {"name": name, "device": "cuda"})


def test_options_are_read_as_the_types_of_the_signature():
    assert reward_of(name="brightness", scale="2.5").scale == 2.5
    text = user_error(rewards_of, {"name": "brightness", "scale": "much"})
    assert all(part in text for part in ("brightness", "scale", "much"))


def test_a_mistake_in_the_last_entry_comes_before_the_first_ones_weights():
    assert "qualiti" in user_error(
        rewards_of, {"name": "clip_score", "path": "/no/such/folder"}, {"name": "jpeg_size", "qualiti": 3}
    )


def test_rewards_of_one_name_are_told_apart_by_labels():
    rewards = rewards_of({"name": "brightness"}, {"name": "brightness", "label": "twice", "scale": 2.0, "weight": 0.5})
    scores = rewards(pictures(2, 6, 10), SENTENCES)
    assert list(rewards.scorers) == ["brightness", "twice"]
    torch.testing.assert_close(scores[:, 1], 2 * scores[:, 0])
    assert "label" in user_error(rewards_of, {"name": "brightness"}, {"name": "brightness", "scale": 2.0})
    assert "label" in user_error(rewards_of, {"name": "shapes", "label": "brightness"}, {"name": "brightness"})
    assert "weighted_sum" in user_error(rewards_of, {"name": "brightness", "label": "weighted_sum"})
    for label in ("a/b", "", " a", "a\n"):
        assert "label" in user_error(rewards_of, {"name": "brightness", "label": label})


def test_rewards_of_evaluations_are_beside_those_that_train_and_weigh_nothing():
    recipe = small_recipe(
        reward=[{"name": "brightness", "weight": 0.5}],
        run={"eval": {"rewards": [{"name": "brightness", "label": "twice", "scale": 2.0}, {"name": "jpeg_size"}]}},
    )
    rewards = registry.Rewards(recipe)
    both, some = rewards.of_evaluations, pictures(2, 6, 10)
    assert (list(rewards.scorers), list(both.scorers)) == (["brightness"], ["brightness", "twice", "jpeg_size"])
    assert both.weights == rewards.weights == [0.5]
    assert both.scorers["brightness"] is rewards.scorers["brightness"]
    assert both.of_evaluations is both is rewards.of_evaluations
    torch.testing.assert_close(both(some, SENTENCES)[:, 1], 2 * rewards(some, SENTENCES)[:, 0])
    of_training = {"reward": [{"name": "shapes"}], "run": {"eval": {"rewards": [{"name": "shapes"}]}}}
    assert "label" in user_error(lambda: registry.Rewards(small_recipe(**of_training)))
    weighted = {"run": {"eval": {"rewards": [{"name": "shapes", "weight": 2.0}]}}}
    assert "run.eval.rewards" in user_error(lambda: small_recipe(**weighted))


def test_frames_are_averaged():
    videos = pictures(8, 6, 10).view(2, 4, 3, 6, 10)
    rewards = rewards_of({"name": "brightness"}, {"name": "jpeg_size"})
    scores = rewards(videos, SENTENCES)
    torch.testing.assert_close(scores[:, 0], videos.double().mean((1, 2, 3, 4)), atol=1e-6, rtol=0)
    sizes = torch.stack([JpegSizeReward()(video, ["x"] * 4).double().mean() for video in videos])
    torch.testing.assert_close(scores[:, 1], sizes)
    assert rewards.scorers["brightness"].given == [((8, 3, 6, 10), [SENTENCES[0]] * 4 + [SENTENCES[1]] * 4)]


def test_a_reward_for_videos_gets_them_whole():
    videos = pictures(8, 6, 10).view(2, 4, 3, 6, 10)
    rewards = rewards_of({"name": "whole"}, {"name": "brightness"})
    scores = rewards(videos, SENTENCES)
    assert rewards.scorers["whole"].given == [((2, 4, 3, 6, 10), SENTENCES)]
    torch.testing.assert_close(scores[:, 0], videos.flatten(1).amax(1).double())
    assert "video" in user_error(rewards, videos[:, 0], SENTENCES)


def test_prompts_are_checked_by_every_reward_that_can():
    rewards = rewards_of({"name": "jpeg_size"}, {"name": "shapes"})
    rewards.check(SENTENCES)
    assert "a photo" in user_error(rewards.check, [*SENTENCES, "a photo"])


def test_gradients_are_not_kept():
    batch = pictures(2, 6, 6).requires_grad_()
    assert not rewards_of({"name": "brightness"})(batch, SENTENCES).requires_grad


# Whole runs


def bright(handler, content, number):
    handler.reply({"scores": [float(len(png)) for png in content["images"]]})


def test_a_run_trains_on_several_weighted_rewards(tmp_path):
    with serving(bright) as server:
        entries = [
            {"name": "shapes", "weight": 2.0},
            {"name": "http", "url": server.url, "weight": 0.001},
            {"name": "jpeg_size", "weight": 0.1},
        ]
        entries.append({"name": "clip_score", "path": str(clip_folder(tmp_path / "clip")), "weight": 0.01})
        recipe = tiny_recipe(tmp_path, reward=entries, run={"iterations": 1, "eval_every": 0})
        succeed("train", recipe, "--out", tmp_path / "run")
        assert sum(len(content["prompts"]) for *_, content in server.asked) == 8  # two prompts of four samples
    (line,) = metrics_of(tmp_path / "run")
    assert list(line["reward"]) == ["shapes", "http", "jpeg_size", "clip_score"]
    assert all(told["std"] > 0 for told in line["reward"].values())


def test_a_run_whose_reward_fails_ends_with_one_line(tmp_path):
    with serving(lambda handler, content, number: handler.reply(b"out of order", 404)) as server:
        recipe = tiny_recipe(tmp_path, reward=[{"name": "http", "url": server.url}])
        result = flowgrove("train", recipe, "--out", tmp_path / "run")
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    text = error_line(result.stdout, result.stderr)
    assert all(part in text for part in (server.url, "404", "out of order"))


def test_a_run_whose_weights_are_absent_ends_before_a_model_is_loaded(tmp_path):
    recipe = tiny_recipe(tmp_path, reward=[{"name": "pickscore", "path": str(tmp_path / "weights")}])
    text = refuse("train", recipe, "--out", tmp_path / "run", "--set", "model.path=tiny")
    assert "hf download yuvalkirstain/PickScore_v1" in text
    assert not (tmp_path / "run").exists()
