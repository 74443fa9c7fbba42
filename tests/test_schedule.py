import pickle
import numpy as np, pytest, torch
from blocks.core import DataError
from blocks.train.schedule import SchedCos, SchedExp, SchedLin, SchedNo, SchedPoly, combine_scheds, combined_cos, constant, flat_cos, one_cycle, sgdr, spread_lr

PIECES = [SchedLin, SchedCos, SchedExp, lambda a, b: SchedPoly(a, b, 2.5)]

@pytest.mark.parametrize('make', PIECES)
@pytest.mark.parametrize('ends', [(3., .2), (.2, 3.), (np.array([1., 2.]), np.array([.1, 4.]))])
def test_pieces_reach_both_ends_and_go_one_way(make, ends):
    s = make(*ends); values = np.array([s(i/50) for i in range(51)])
    np.testing.assert_allclose(values[0], ends[0]); np.testing.assert_allclose(values[-1], ends[1])
    assert (np.diff(values, axis=0)*np.sign(np.subtract(ends[1], ends[0])) > 0).all()

def test_shapes_of_the_pieces():
    assert SchedLin(0, 8)(.25) == 2 and SchedPoly(0, 16, 2)(.25) == 1
    assert SchedExp(1e-6, 1e-2)(.25) == pytest.approx(1e-5) and SchedCos(0, 1)(1/3) == pytest.approx(.25)
    assert SchedNo(5, 1)(.7) == 5
    assert isinstance(SchedCos(.5, 1)(.1), float)

@pytest.mark.parametrize('ends', [(0, 1), (1, 0), (-1, 1), ([1, 0], [1, 1])])
def test_exponential_refuses_what_it_cannot_do(ends):
    with pytest.raises(DataError, match='above 0'): SchedExp(*ends)

def test_a_schedule_keeps_its_own_array():
    lr = np.array([1., 2.]); s = SchedLin(lr, 0); lr[:] = 9
    np.testing.assert_array_equal(s(0), [1, 2])

def test_schedules_survive_pickling_alone_and_combined():
    for s in (*[m(1., .1) for m in PIECES], SchedNo(1, 2), combined_cos(.3, 1., 2., .1), one_cycle([1e-3, 1e-2])['lr'], flat_cos(1.)['lr'], constant(2.)['lr']):
        back = pickle.loads(pickle.dumps(s))
        for pos in (0, .2, .3, .9, 1): np.testing.assert_array_equal(back(pos), s(pos))

def test_combined_cos_known_values():
    f = combined_cos(.25, .5, 1, 0)
    np.testing.assert_allclose([f(o) for o in (0, .1, .25, .5, 1.)], [.5, .67275, 1, .75, 0], atol=1e-5)

def test_at_a_joint_the_later_piece_counts():
    f = combine_scheds([.5, .5], [SchedNo(1, 1), SchedNo(2, 2)])
    assert [f(o) for o in (0, .499, .5, 1)] == [1, 1, 2, 2]

@pytest.mark.parametrize('pcts', [[.1, .2, .7], [1/3]*3, [.1]*10])
def test_shares_that_add_up_only_nearly(pcts):                           # floats: .1+.2+.7 is not 1, ten times .1 neither
    f = combine_scheds(pcts, [SchedLin(i, i + 1) for i in range(len(pcts))])
    assert f(0) == 0 and f(1) == len(pcts) and f(1 - 1e-9) == pytest.approx(len(pcts), abs=1e-6)

@pytest.mark.parametrize('pcts,at', [([0, 1], {0: 10, .5: 15, 1: 20}), ([1, 0], {0: 0, .5: 5, 1: 10}), ([.5, 0, .5], {.25: 5, .5: 20, 1: 30})])
def test_a_share_of_zero_leaves_the_piece_out(pcts, at):
    f = combine_scheds(pcts, [SchedLin(10*i, 10*i + 10) for i in range(len(pcts))])
    for pos, want in at.items(): assert f(pos) == pytest.approx(want)

@pytest.mark.parametrize('pcts,n', [([.5, .6], 2), ([.5, .4], 2), ([-.5, 1.5], 2), ([1.], 2), ([], 0), ([float('nan'), .5], 2)])
def test_bad_shares(pcts, n):
    with pytest.raises(DataError, match='share'): combine_scheds(pcts, [SchedNo(1, 1)]*n)

def test_one_cycle():
    s = one_cycle(2e-3); lr = [s['lr'](i/1000) for i in range(1001)]; mom = [s['mom'](i/1000) for i in range(1001)]
    assert lr[0] == pytest.approx(8e-5) and lr[-1] == pytest.approx(2e-8) and max(lr) == pytest.approx(2e-3) and int(np.argmax(lr)) == 250
    assert mom[0] == mom[-1] == pytest.approx(.95) and min(mom) == pytest.approx(.85) and int(np.argmin(mom)) == 250

def test_one_cycle_for_groups():
    s = one_cycle(spread_lr(slice(1e-5, 1e-3), 3), div=5)
    np.testing.assert_allclose(s['lr'](0), [2e-6, 2e-5, 2e-4]); np.testing.assert_allclose(s['lr'](.25), [1e-5, 1e-4, 1e-3])

@pytest.mark.parametrize('pct', [0., 1.])
def test_one_cycle_without_a_rise_or_a_fall(pct):
    s = one_cycle(1., pct_start=pct)
    assert np.isfinite([s[k](i/20) for k in s for i in range(21)]).all() and s['lr'](pct) == pytest.approx(1.)

@pytest.mark.parametrize('kw,word', [(dict(pct_start=1.2), 'pct_start'), (dict(pct_start=None), 'pct_start'), (dict(div=0), 'div'), (dict(div_final=-1), 'div_final'),
    (dict(moms=(.9, .8)), 'moms'), (dict(moms=None), 'moms'), (dict(moms=(.9, 1., .9)), 'moms'), (dict(lr_max=-1.), 'learning rate'), (dict(lr_max=float('nan')), 'learning rate')])
def test_one_cycle_refuses(kw, word):
    with pytest.raises(DataError, match=word): one_cycle(**{'lr_max': 1e-3, **kw})

def test_flat_cos_and_constant():
    s = flat_cos(1e-2)['lr']
    assert all(s(i/100) == pytest.approx(1e-2) for i in range(76)) and s(.875) == pytest.approx((1e-2 + 1e-7)/2) and s(1) == pytest.approx(1e-7)
    np.testing.assert_array_equal(constant([1., 2.])['lr'](.3), [1, 2])

@pytest.mark.parametrize('lr,want', [(1e-3, [1e-3]*3), (1, [1.]*3), (0., [0.]*3), (np.float32(.5), [.5]*3), (torch.tensor(.5), [.5]*3),
    (slice(1e-2), [1e-3, 1e-3, 1e-2]), (slice(None, 1e-2), [1e-3, 1e-3, 1e-2]), (slice(1e-5, 1e-3), [1e-5, 1e-4, 1e-3]), (slice(1e-3, 1e-5), [1e-3, 1e-4, 1e-5]),
    ([1, 2, 3], [1., 2., 3.]), ((0, 0, 1e-3), [0., 0., 1e-3]), (np.array([1., 2., 3.]), [1., 2., 3.]), (torch.tensor([1., 2., 3.]), [1., 2., 3.])])
def test_spread_lr(lr, want):
    got = spread_lr(lr, 3)
    assert type(got) is list and all(type(o) is float for o in got) and got == pytest.approx(want, rel=1e-12)

def test_spread_lr_over_one_group_is_the_head():
    assert spread_lr(slice(1e-2), 1) == [1e-2] and spread_lr(slice(1e-5, 1e-3), 1) == [1e-3] and spread_lr([3e-3], 1) == [3e-3]

@pytest.mark.parametrize('lr,word', [([1e-3, 1e-2], '3 parameter groups.*2'), (np.ones(4), '3 parameter groups.*4'), (-1e-3, 'from 0 up'), ([1e-3, -1., 1.], '-1'), ('1e-3', "'1e-3'"),
    (['a', 1., 1.], "'a'"), (None, 'None'), (True, 'True'), (float('inf'), 'inf'), (float('nan'), 'nan'), (slice(0, 1e-3), 'slice'), (slice(1e-3, None), 'slice'), (slice(None), 'slice'),
    (slice(1e-5, 1e-3, 2), 'slice'), (slice('a', 'b'), 'slice'), (slice(-1e-3), 'slice'), ([], '3 parameter groups'), (np.ones((3, 1)), 'learning rate')])
def test_spread_lr_refuses(lr, word):
    with pytest.raises(DataError, match=word): spread_lr(lr, 3)

@pytest.mark.parametrize('n,length,mult', [(3, 1, 2), (4, 3, 1), (3, 2, 3), (5, 1, 2)])
def test_warm_restarts_begin_on_time_however_positions_are_rounded(n, length, mult):
    f, total = sgdr(1., n, length, mult)['lr'], sum(length*mult**i for i in range(n))
    starts = [sum(length*mult**i for i in range(k)) for k in range(n)]
    for steps in (1, 3, 7):
        for start in starts:
            assert f((start + 0/steps)/total) == pytest.approx(1.) and f(sum([1/(steps*total)]*(start*steps))) == pytest.approx(1.)      # as a quotient, and added up step by step
            if start and steps > 1: assert f((start - 1/steps)/total) < f(start/total)

def test_warm_restarts_of_groups():
    np.testing.assert_allclose(sgdr([1., 2.], 2, 1)['lr'](1/3), [1, 2])
