"""What a run tells while it trains, where nobody looks at a terminal."""

from jaxlm.log import Log, lines


def test_a_line_tells_the_loss_the_speed_and_the_share_of_the_time_that_steps_waited(tmp_path, capsys):
    with Log(str(tmp_path), start_step=0, steps=4) as log:
        log.waited(1e6, 1e6)  # longer than the run is old: all of its time
        log.tick(1, 100)
        log.train(1, {"loss": 2.5, "lr": 1e-3})
        log.train(2, {"loss": 2.0, "lr": 1e-3})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/4  loss 2.5000  lr 1.00e-03  ") and "tokens/s  data wait 100.0 %  " in first
    assert "loss 2.0000  lr 1.00e-03  0 tokens/s  data wait 0.0 %  " in second
    assert [line["wait_share"] for line in lines(str(tmp_path))] == [1.0, 0.0]
