//! Layers split over ranks with GPUs: what was recorded, every collective, and every way to fail. Ranks
//! share a GPU where there is one; with two, NCCL connects them.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use moe_runner::comm::tcp::{self, Rendezvous};
use moe_runner::comm::{self, At, Communicator, Groups, Sizes, Step, nccl, run_ranks};
use moe_runner::exchange::resident::Room;
use moe_runner::exchange::{BetweenGpus, ExpertMap};
use moe_runner::experts::{Device, RowFormat};
use moe_runner::hidden::ActivationDtype::{Bf16, F32};
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::parallel::{ExchangeKind, Parallel, Placement, cost};
use moe_runner::router::LogicalId;
use moe_runner::runner::{
    Batch, ForwardInput, MoeRunner, MoeRunnerInterface, Options, RankedRunner, forward_batch,
};
use moe_runner::spec::LayerSpec;
use moe_runner::weights::{FloatType, RandomFormat};
use moe_runner::{Error, Result};

use crate::cases::{Case, TOKENS, all_cases};
use crate::layers::{self, nmse, rows, sizes};
use crate::{gpu, suite};

fn splits() -> Vec<(&'static str, Parallel)> {
    let with = |sizes: Sizes| Parallel { sizes, ..Parallel::default() };
    let ep = sizes(1, 2, 1, true);
    vec![
        ("tp 2", with(sizes(2, 1, 1, false))),
        ("tp 2 ep", with(sizes(2, 1, 1, true))),
        ("dp 2", with(sizes(1, 2, 1, false))),
        ("dp 2 ep", with(ep)),
        ("dp 2 ep round-robin", Parallel { placement: Placement::RoundRobin, ..with(ep) }),
        ("dp 2 ep naive", Parallel { exchange: ExchangeKind::Naive, ..with(ep) }),
        ("dp 2 ep dbo 2", Parallel { micro_batches: 2, ..with(ep) }),
        ("pcp 2", with(sizes(1, 1, 2, false))),
        ("pcp 2 ep", with(sizes(1, 1, 2, true))),
        ("tp 2 sp", with(Sizes { sequence_parallel: true, ..sizes(2, 1, 1, true) })),
    ]
}

/// Every recorded layer in every one of `splits`, on this rank: how many.
fn recorded(
    cases: &[Case],
    splits: &[(&'static str, Parallel)],
    world: &Arc<dyn Communicator>,
    options: &Options,
) -> Result<usize> {
    let mut done = 0;
    for case in cases {
        for (entry, layer) in case.layers() {
            for (name, parallel) in splits {
                let groups = Groups::new(world.clone(), parallel.sizes)?;
                for tokens in TOKENS {
                    let recorded = case.recorded(entry.spec.index, tokens);
                    let batch = Batch { hidden: &recorded.x, router_logits: None, input_ids: None };
                    let place = format!("{} {} {name} T={tokens}", case.name, entry.spec.name);
                    let got = forward_batch(&layer, options, &groups, parallel, &batch, None);
                    let got = match got {
                        Ok(got) => got,
                        // as on one GPU; or slices where the whole of a row is needed
                        Err(Error::NoKernel(why)) if why.contains("activations as nvfp4") => break,
                        Err(Error::Spec { reason, .. })
                            if !parallel.sizes.use_ep()
                                && reason.contains("(expert parallelism)") =>
                        {
                            break;
                        }
                        Err(error) => {
                            return Err(Error::Communication(format!("{place}: {error}")));
                        }
                    };
                    assert!(got.kernel.starts_with("cuda_"), "{place}: {}", got.kernel);
                    let error = nmse(&got.output, &recorded.out);
                    assert!(error <= recorded.bound(), "{place}: NMSE {error:e}");
                    done += 1;
                }
            }
        }
    }
    Ok(done)
}

fn on(options: &Options, gpu: usize) -> Options {
    Options { gpu, ..options.clone() }
}

#[test]
fn recorded_layers_are_reproduced_by_ranks_that_share_a_gpu() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let cases = all_cases();
    // slices and whole experts: what is between them is the same code
    let splits: Vec<_> =
        splits().into_iter().filter(|(name, _)| ["tp 2", "dp 2 ep"].contains(name)).collect();
    let done = run_ranks(2, |world| recorded(&cases, &splits, world, &options)).unwrap();
    println!("{} recordings reproduced by two ranks on one GPU", done[0]);
    assert!(done[0] > 100 && done[0] == done[1], "{done:?}");
}

/// Options for the first of so many GPUs; `None`, and the reason told, where there are fewer.
fn gpus(count: usize) -> Option<Options> {
    let options = gpu(F32)?;
    match moe_runner::experts::cuda::capability(count - 1) {
        Ok(_) => Some(options),
        Err(reason) => {
            println!("skipped, fewer than {count} GPUs: {reason}");
            None
        }
    }
}

fn two_gpus() -> Option<Options> {
    gpus(2)
}

/// Four ranks, in every kind of split.
fn splits_of_four() -> Vec<(&'static str, Parallel)> {
    let with = |sizes: Sizes| Parallel { sizes, ..Parallel::default() };
    let sequence = |sizes: Sizes| Sizes { sequence_parallel: true, ..sizes };
    let ep = sizes(1, 4, 1, true);
    vec![
        ("tp 4", with(sizes(4, 1, 1, false))),
        ("tp 4 ep", with(sizes(4, 1, 1, true))),
        ("dp 4", with(sizes(1, 4, 1, false))),
        ("dp 4 ep", with(ep)),
        ("dp 4 ep through the host", Parallel { keeps_rows: false, ..with(ep) }),
        ("dp 4 ep dbo 2", Parallel { micro_batches: 2, ..with(ep) }),
        ("tp 2 dp 2 ep", with(sizes(2, 2, 1, true))),
        ("dp 2 pcp 2 ep", with(sizes(1, 2, 2, true))),
        ("tp 4 sp", with(sequence(sizes(4, 1, 1, true)))),
        ("tp 2 dp 2 sp", with(sequence(sizes(2, 2, 1, true)))),
    ]
}

#[test]
fn recorded_layers_are_reproduced_over_four_gpus() {
    let _alone = crate::alone();
    let Some(options) = gpus(4) else { return };
    let cases = all_cases();
    let start = Instant::now();
    let done = run_ranks(4, |world| {
        let world = nccl::open(world.clone(), world.rank())?;
        recorded(&cases, &splits_of_four(), &world, &on(&options, world.rank()))
    })
    .unwrap();
    println!("{} recordings reproduced over four GPUs in {:?}", done[0], start.elapsed());
    assert!(done[0] > 500 && done.iter().all(|count| *count == done[0]), "{done:?}");
}

/// A layer, and the kernels that this GPU has for it, each with a format of weights.
fn every_kernel() -> (LayerSpec, Vec<(&'static str, RandomFormat)>) {
    let hopper = moe_runner::experts::cuda::capability(0).is_ok_and(|capability| capability == 90);
    let mut spec = layers::plain();
    spec.router = moe_runner::spec::RouterSpec::softmax(8, 3, true);
    (spec.dims.hidden, spec.dims.routed_hidden, spec.dims.intermediate) = (512, 512, 256);
    let fast = crate::fast::formats().into_iter().filter(|_| hopper);
    (spec, fast.chain([("cuda_f32", FloatType::Bf16.into())]).collect())
}

/// Rows that stay on the GPUs: the bits of one GPU wherever whole experts are, for every kernel, with ragged ranks
/// and ranks without rows, with and without the host's knowledge of counts; and as many bytes as are predicted.
#[test]
fn rows_that_stay_on_gpus_give_the_bits_of_one() {
    let _alone = crate::alone();
    let Some(options) = gpus(2) else { return };
    let ranks = if gpus(4).is_some() { 4 } else { 2 };
    let (spec, kernels) = every_kernel();
    // what one GPU gives
    let mut wanted = Vec::new();
    for (kernel, format) in kernels {
        let layer = moe_runner::weights::random_layer(&spec, format, 7).unwrap();
        let options = Options { kernel: Some(kernel.into()), dtype: Bf16, ..options.clone() };
        for tokens in [1, 3, 41, 1000, 3000] {
            let hidden = rows(Bf16, tokens, 512, tokens as u64);
            let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
            let alone = Groups::new(comm::single(), Sizes::default()).unwrap();
            let one = forward_batch(&layer, &options, &alone, &Parallel::default(), &batch, None);
            let one = one.unwrap_or_else(|error| panic!("{kernel}: {error}"));
            wanted.push((kernel, layer.clone(), options.clone(), hidden, one));
        }
    }
    let done = run_ranks(ranks, |world| {
        let world = nccl::open(world.clone(), world.rank())?;
        let (mut done, mut put) = (0, 0);
        for (kernel, layer, options, hidden, one) in &wanted {
            let tokens = hidden.len() / 512;
            let batch = Batch { hidden, router_logits: None, input_ids: None };
            let ids: Vec<LogicalId> = one.topk_ids.iter().map(|id| LogicalId(*id)).collect();
            let share = tokens.div_ceil(ranks);
            let room = Room { slots: 3 * share, rows: share };
            // each whole, and in two micro-batches
            let forms = [(None, true), (None, false), (Some(room), false)];
            let forms = forms.map(|(room, put)| [1, 2].map(|lanes| (room, put, lanes))).concat();
            let placements = [Placement::Linear, Placement::RoundRobin];
            for (placement, form) in
                placements.iter().flat_map(|p| forms.iter().map(move |f| (*p, *f)))
            {
                let (room, one_sided, micro_batches) = form;
                let place = format!("{kernel}, {tokens} tokens, {placement:?}, {form:?}");
                let sizes = sizes(1, ranks, 1, true);
                let parallel = Parallel {
                    sizes,
                    placement,
                    room,
                    one_sided,
                    micro_batches,
                    ..Parallel::default()
                };
                let groups = Groups::new(world.clone(), parallel.sizes)?;
                let reach = groups.ep.peers().is_some_and(|peers| peers.reaches());
                let Some(way) = parallel.between_gpus(&layer.spec, reach)? else { continue };
                let options = on(options, world.rank());
                let mut runner = RankedRunner::new(layer, &options, &groups, &parallel)?;
                assert!(runner.runner().is_spread(), "{place}");
                runner.forward(&batch)?;
                // memory that was used before
                let got = runner.forward(&batch)?;
                let few = *kernel != "cuda_f32" && tokens * 3 <= 512;
                if few {
                    // one GPU has another kernel for few slots
                    let wide: Vec<f64> = one.output.iter().map(|v| f64::from(*v)).collect();
                    let error = nmse(&got.output, &wide);
                    assert!(error <= 4e-5, "{place}: {error:e}");
                } else {
                    assert!(got.output == one.output, "{place}");
                }
                let map = placement.map(8, ranks).unwrap();
                let wire = cost::Pass::gpu_wire(layer, Bf16, runner.runner().method().desc());
                let cost = cost::Pass::new(layer, Bf16, &parallel, &map)?.on_gpus(wire, way);
                put += usize::from(way == BetweenGpus::OneSided);
                assert_eq!(got.traffic, cost.traffic(&ids)[world.rank()], "{place}");
                done += 1;
            }
        }
        Ok((done, put))
    });
    let (done, put) = done.unwrap()[0];
    println!("{done} passes over {ranks} GPUs, {put} of them one-sided");
}

/// The exchange alone, timed in every form, with memory that passes of another layer have replaced by more: no pass after it
/// has other bits.
#[test]
fn an_exchange_is_timed_alone() {
    let _alone = crate::alone();
    let Some(options) = gpus(2) else { return };
    let (mut spec, kernels) = every_kernel();
    // memory of its own for products of this shape
    (spec.dims.hidden, spec.dims.routed_hidden, spec.dims.intermediate) = (768, 768, 384);
    let sizes = sizes(1, 2, 1, true);
    let timed = run_ranks(2, |world| {
        let world = nccl::open(world.clone(), world.rank())?;
        let groups = Groups::new(world, sizes)?;
        let mut timed = 0;
        for (kernel, format) in &kernels {
            let layers = [7, 8].map(|seed| moe_runner::weights::random_layer(&spec, *format, seed));
            let [small, large] = layers.map(|layer| layer.unwrap());
            let options =
                Options { kernel: Some((*kernel).into()), dtype: Bf16, ..options.clone() };
            let options = on(&options, groups.world.rank());
            let mut tokens = 300;
            for (room, one_sided, micro_batches) in [
                (None, true, 1),
                (None, true, 2),
                (None, false, 1),
                (None, false, 2),
                (Some(Room { slots: 9000, rows: 3000 }), false, 1),
            ] {
                let parallel =
                    Parallel { sizes, room, one_sided, micro_batches, ..Parallel::default() };
                let hidden = rows(Bf16, 2 * tokens, 768, 3);
                let few =
                    Batch { hidden: &hidden[..tokens * 768], router_logits: None, input_ids: None };
                let many = Batch { hidden: &hidden, ..few };
                let mut first = RankedRunner::new(&small, &options, &groups, &parallel)?;
                let mut second = RankedRunner::new(&large, &options, &groups, &parallel)?;
                let before = first.forward(&few)?;
                second.forward(&many)?;
                let own = first.rows(tokens).len();
                let time = first.runner_mut().exchange_time(own, 2)?;
                let place = format!("{kernel}, {micro_batches} micro-batches, room {room:?}");
                let time = time.unwrap_or_else(|| panic!("{place}: nothing was timed"));
                assert!(time.seconds > 0.0 && time.bare_seconds > 0.0 && time.sent > 0, "{place}");
                assert!(first.forward(&few)?.output == before.output, "{place}");
                timed += 1;
                // more than there is memory for
                tokens += tokens / 2;
            }
        }
        Ok(timed)
    });
    println!("{} exchanges timed alone", timed.unwrap()[0]);
}

/// Experts move from GPU to GPU while passes go on: the bits of one GPU before, meanwhile and after, in every format and
/// form; with copies, a rank that has no expert, and the load that the GPUs count.
#[test]
fn no_bit_changes_while_experts_move_between_gpus() {
    let _alone = crate::alone();
    let Some(options) = gpus(2) else { return };
    let ranks = if gpus(4).is_some() { 4 } else { 2 };
    let (spec, kernels) = every_kernel();
    let held = |ids: &[&[u32]]| -> Arc<ExpertMap> {
        let of = |ids: &&[u32]| ids.iter().copied().map(LogicalId).collect();
        let mut held: Vec<Vec<LogicalId>> = ids.iter().map(of).collect();
        held.resize(ranks, Vec::new());
        Arc::new(ExpertMap::new(8, &held).unwrap())
    };
    // copies, one twice on a rank; the last leaves ranks without any
    let maps = [
        held(&[&[0, 1, 2, 3, 7], &[4, 5, 6, 7, 0]]),
        held(&[&[7, 6, 5, 4, 0], &[3, 2, 1, 0, 3]]),
        held(&[&[], &[0, 1, 2, 3, 4, 5, 6, 7]]),
        held(&[&[0, 2, 4, 6, 1], &[1, 3, 5, 7, 0]]),
    ];
    for (kernel, format) in kernels {
        let layer = moe_runner::weights::random_layer(&spec, format, 7).unwrap();
        let options = Options { kernel: Some(kernel.into()), dtype: Bf16, ..options.clone() };
        let hidden = rows(Bf16, 600, 512, 3);
        let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
        let alone = Groups::new(comm::single(), Sizes::default()).unwrap();
        let one = forward_batch(&layer, &options, &alone, &Parallel::default(), &batch, None);
        let one = one.unwrap_or_else(|error| panic!("{kernel}: {error}"));
        let done = run_ranks(ranks, |world| {
            let world = nccl::open(world.clone(), world.rank())?;
            let mut passes = 0;
            for one_sided in [true, false] {
                let sizes = sizes(1, ranks, 1, true);
                let parallel = Parallel { sizes, one_sided, ..Parallel::default() };
                let groups = Groups::new(world.clone(), sizes)?;
                let options = on(&options, world.rank());
                let first = maps[0].clone();
                let runner = MoeRunner::on_rank_with(&layer, &options, &groups, &parallel, first)?;
                let mut runner = RankedRunner::of(runner, &groups);
                runner.runner_mut().count_load(true)?;
                let mut pass = |runner: &mut RankedRunner<'_>, which: usize| {
                    let got = runner.forward(&batch)?;
                    let place = format!("{kernel}, one-sided {one_sided}, placement {which}");
                    assert!(got.output == one.output, "{place}");
                    passes += 1;
                    Ok::<_, Error>(())
                };
                for (which, map) in maps.iter().enumerate().skip(1) {
                    pass(&mut runner, which - 1)?;
                    runner.runner_mut().start_move(map)?;
                    pass(&mut runner, which - 1)?;
                    runner.runner_mut().finish_move(&groups, &parallel)?;
                    pass(&mut runner, which)?;
                    pass(&mut runner, which)?;
                    let mut load = runner.runner_mut().take_load()?;
                    world.all_reduce(at(Step::Balance), &mut load)?;
                    let mut want = vec![0; 8];
                    one.topk_ids.iter().for_each(|id| want[*id as usize] += 4);
                    assert_eq!(load, want, "{kernel}, one-sided {one_sided}, placement {which}");
                }
            }
            Ok(passes)
        });
        println!("{kernel}: {} passes while experts moved over {ranks} GPUs", done.unwrap()[0]);
    }
}

/// Micro-batches of one-sided passes on streams of their own: each GPU's timeline has the steps of both, and the rows of the
/// second are put before the experts of the first are done.
#[test]
fn the_timeline_of_gpus_has_both_halves() {
    let _alone = crate::alone();
    let Some(options) = gpus(2) else { return };
    let mut spec = layers::plain();
    spec.shared = Some(layers::shared());
    (spec.dims.hidden, spec.dims.routed_hidden, spec.dims.intermediate) = (512, 512, 256);
    let layer = moe_runner::weights::random_layer(&spec, FloatType::Bf16, 7).unwrap();
    let hidden = rows(F32, 2000, 512, 3);
    let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
    let sizes = sizes(1, 2, 1, true);
    let parallel = Parallel { sizes, micro_batches: 2, ..Parallel::default() };
    let done = run_ranks(2, |world| {
        let world = nccl::open(world.clone(), world.rank())?;
        let groups = Groups::new(world, sizes)?;
        let options = on(&options, groups.world.rank());
        let reach = groups.ep.peers().is_some_and(|peers| peers.reaches());
        forward_batch(&layer, &options, &groups, &parallel, &batch, None)?;
        let origin = Some(Instant::now());
        let got = forward_batch(&layer, &options, &groups, &parallel, &batch, origin)?;
        Ok((reach, got.spans))
    });
    for (reach, spans) in done.unwrap() {
        if !reach {
            println!("skipped: the GPUs do not reach each other's memory");
            return;
        }
        let of = |what: &str, lane| {
            let found = spans.iter().find(|span| (span.what, span.lane) == (what, lane));
            *found.unwrap_or_else(|| panic!("no {what} of {lane:?} in {spans:?}"))
        };
        for what in ["dispatch", "wait for dispatch", "experts", "wait for combine", "combine"] {
            let [first, second] = [0, 1].map(|lane| of(what, Some(lane)));
            println!(
                "{what}: {:?} to {:?}, {:?} to {:?}",
                first.start, first.end, second.start, second.end
            );
        }
        of("shared experts", None);
        assert!(of("dispatch", Some(1)).start < of("experts", Some(0)).end);
    }
}

/// A rank that sleeps between two one-sided passes is named by the signals in the others' memory.
#[test]
fn a_rank_that_sleeps_in_a_one_sided_pass_is_named() {
    let _alone = crate::alone();
    let Some(options) = gpus(2) else { return };
    let layer = moe_runner::weights::random_layer(&layers::plain(), FloatType::F32, 7).unwrap();
    let sizes = sizes(1, 2, 1, true);
    let parallel = Parallel { sizes, ..Parallel::default() };
    let timeout = comm::Options { timeout: Duration::from_secs(2) };
    let said = std::sync::Mutex::new(Vec::new());
    let _ = comm::run_ranks_with(2, timeout, |world| {
        let world = nccl::open_with(world.clone(), world.rank(), timeout, None)?;
        let groups = Groups::new(world, sizes)?;
        let me = groups.world.rank();
        if groups.ep.peers().is_none_or(|peers| !peers.reaches()) {
            return Ok(());
        }
        let hidden = rows(F32, 40, 48, 1);
        let options = on(&options, me);
        let mut runner = MoeRunner::on_rank(&layer, &options, &groups, &parallel)?;
        let mut out = vec![0.0; hidden.len()];
        let input = ForwardInput::new(Rows::F32(&hidden));
        runner.forward(&input, RowsMut::F32(&mut out))?;
        // rank 1 agrees to the next pass, and puts nothing
        if me == 1 {
            let next = At::new("model.layers.0.mlp", Step::Dispatch);
            groups.ep.peers().map(|peers| peers.most(next, [40, 2])).transpose()?;
            std::thread::sleep(Duration::from_secs(5));
            return Ok(());
        }
        let ended = runner.forward(&input, RowsMut::F32(&mut out));
        said.lock().unwrap().push(ended.map_or_else(|e| e.to_string(), |_| "well".into()));
        Ok(())
    });
    for said in said.into_inner().unwrap() {
        for word in ["waited 2 s for rank 1, last seen at", "step 'combine', in", "step 'dispatch'"]
        {
            assert!(said.contains(word), "no '{word}' in {said}");
        }
    }
}

/// More rows than have room are told by all.
#[test]
fn what_has_no_room_on_a_gpu_is_told() {
    let _alone = crate::alone();
    let Some(options) = gpus(2) else { return };
    let layer = moe_runner::weights::random_layer(&layers::plain(), FloatType::F32, 7).unwrap();
    let room = Some(Room { slots: 5, rows: 5 });
    let parallel = Parallel { sizes: sizes(1, 2, 1, true), room, ..Parallel::default() };
    let hidden = rows(F32, 60, 48, 1);
    let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
    let error = run_ranks(2, |world| {
        let world = nccl::open(world.clone(), world.rank())?;
        let groups = Groups::new(world, parallel.sizes)?;
        let options = on(&options, groups.world.rank());
        forward_batch(&layer, &options, &groups, &parallel, &batch, None)
    });
    let error = error.map(drop).unwrap_err().to_string();
    assert!(error.contains("has room for 5 slots or rows"), "{error}");
}

#[test]
fn recorded_layers_are_reproduced_over_two_gpus() {
    let _alone = crate::alone();
    let Some(options) = two_gpus() else { return };
    let cases = all_cases();
    let start = Instant::now();
    let done = run_ranks(2, |world| {
        let world = nccl::open(world.clone(), world.rank())?;
        if world.rank() == 0 {
            println!("{} after {:?}", world.name(), start.elapsed());
        }
        recorded(&cases, &splits(), &world, &on(&options, world.rank()))
    })
    .unwrap();
    println!("{} recordings reproduced over two GPUs in {:?}", done[0], start.elapsed());
    assert!(done[0] > 500 && done[0] == done[1], "{done:?}");
}

/// Whole experts anywhere: no bit changes, not from one GPU's experts to two's, nor with the fast kernels. Rows that
/// pass through the host are routed there; those that stay on GPUs have a test of their own.
#[test]
fn where_whole_experts_are_changes_no_bit() {
    let _alone = crate::alone();
    let Some(options) = gpu(Bf16) else { return };
    let second = usize::from(two_gpus().is_some());
    let mut spec = layers::plain();
    (spec.dims.hidden, spec.dims.routed_hidden, spec.dims.intermediate) = (256, 256, 128);
    let layer = moe_runner::weights::random_layer(&spec, FloatType::Bf16, 7).unwrap();
    let hopper = moe_runner::experts::cuda::capability(0).is_ok_and(|capability| capability == 90);
    for kernel in ["cuda_f32", "cuda_sm90_bf16"].into_iter().take(1 + usize::from(hopper)) {
        for tokens in [3, 40, 1000] {
            let hidden = rows(Bf16, tokens, 256, tokens as u64);
            let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
            let mut first: Option<Vec<f32>> = None;
            for (name, parallel) in splits().iter().filter(|(_, p)| p.sizes.use_ep()) {
                let parallel = &Parallel { keeps_rows: false, ..*parallel };
                if parallel.exchange == ExchangeKind::Naive {
                    continue;
                }
                let outputs = run_ranks(2, |world| {
                    let mut options = on(&options, world.rank() * second);
                    options.kernel = Some(kernel.into());
                    let world = match second {
                        0 => world.clone(),
                        _ => nccl::open(world.clone(), world.rank())?,
                    };
                    let groups = Groups::new(world, parallel.sizes)?;
                    Ok(forward_batch(&layer, &options, &groups, parallel, &batch, None)?.output)
                });
                let outputs = outputs.unwrap_or_else(|error| panic!("{kernel}, {name}: {error}"));
                let first = first.get_or_insert_with(|| outputs[0].clone());
                let same = outputs.iter().all(|output| output == first);
                // which of two kernels runs is decided by the size of the batch
                let batched = kernel != "cuda_f32";
                assert!(same || batched, "{kernel}, {name}, {tokens} tokens");
                let wide: Vec<f64> = first.iter().map(|v| f64::from(*v)).collect();
                let error = nmse(&outputs[1], &wide);
                assert!(error <= 4e-5, "{kernel}, {name}, {tokens} tokens: {error:e}");
            }
        }
    }
}

#[test]
fn every_collective_over_nccl_equals_a_sequential_computation() {
    let _alone = crate::alone();
    if two_gpus().is_none() {
        return;
    }
    run_ranks(2, |world| {
        let world = nccl::open(world.clone(), world.rank())?;
        suite::verdict(&suite::run(&*world, 1, 8)?)?;
        let part = world.split(0, 1 - world.rank())?;
        suite::verdict(&suite::run(&*part, 2, 4)?)
    })
    .unwrap();
}

#[test]
fn what_nccl_cannot_connect_is_told_in_one_line() {
    let _alone = crate::alone();
    if gpu(F32).is_none() {
        return;
    }
    let error = run_ranks(2, |world| nccl::open(world.clone(), 0).map(drop)).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("ranks 0 and 1 have the same GPU"), "{error}");
    let error = run_ranks(2, |world| nccl::open(world.clone(), 70 + world.rank()).map(drop));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the driver shows") && !error.contains('\n'), "{error}");
}

fn at(step: Step) -> At<'static> {
    At::new("model.layers.7.mlp", step)
}

/// What the ranks say when rank 1 does `what` in place of the second of two exchanges.
fn ends(what: impl Fn() -> Result<()> + Sync) -> Vec<String> {
    let options = comm::Options { timeout: Duration::from_secs(2) };
    let said = std::sync::Mutex::new(Vec::new());
    let _ = comm::run_ranks_with(2, options, |world| {
        let world = nccl::open_with(world.clone(), world.rank(), options, None)?;
        world.all_gather(at(Step::Dispatch), vec![1.0f32; 5000])?;
        if world.rank() == 1 {
            what()?;
        }
        let result = world.all_gather(at(Step::Combine), vec![1.0f32; 5000]);
        said.lock().unwrap().push(result.map_or_else(|e| e.to_string(), |_| "well".into()));
        Ok(())
    });
    said.into_inner().unwrap()
}

#[test]
fn a_rank_that_fails_or_sleeps_ends_the_others() {
    let _alone = crate::alone();
    if two_gpus().is_none() {
        return;
    }
    let start = Instant::now();
    let said = ends(|| Err(Error::Device("out of memory".into())));
    let all = said.join("\n");
    assert!(all.contains("rank 1, last seen") && all.contains("out of memory"), "{all}");
    assert!(all.contains("model.layers.7.mlp") && all.contains("'dispatch'"), "{all}");
    let said = ends(|| {
        std::thread::sleep(Duration::from_secs(5));
        Ok(())
    });
    let all = said.join("\n");
    assert_eq!(said.len(), 2, "{all}");
    assert!(all.contains("waited 2 s") && all.contains("rank 1, last seen"), "{all}");
    println!("faults told after {:?}", start.elapsed());
}

const PROCESS: &str = "NCCL_TEST_PROCESS";

/// Not a test: what a process of its own does. Rank 1 says what it brings, and dies before it brings it.
#[test]
#[ignore = "started by another test"]
fn process() {
    let given = std::env::var(PROCESS).expect("started by another test");
    let (rank, address) = given.split_once('@').unwrap();
    let rank: usize = rank.parse().unwrap();
    let work = || -> Result<()> {
        let at_address = Rendezvous { address: address.to_owned(), rank, ranks: 2 };
        let world = tcp::open(&at_address, comm::Options::default())?;
        let world = nccl::open(world, rank)?;
        let all = world.all_gather(at(Step::Dispatch), vec![rank as u32; 50_000])?;
        println!("gathered {} with {}", all.iter().sum::<u32>(), world.name());
        let mut send = world.buffer::<f32>(100_000)?;
        send.fill(1.0);
        let pending = world.start_all_to_all_v(at(Step::Combine), send, &[50_000, 50_000])?;
        if rank == 1 {
            // the note is on its way
            std::thread::sleep(Duration::from_millis(200));
            let _ = Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
        }
        pending.wait(&*world).map(drop)
    };
    if let Err(error) = work() {
        println!("ERROR {error}");
    }
}

#[test]
fn processes_meet_over_tcp_and_a_killed_one_ends_the_other() {
    let _alone = crate::alone();
    if two_gpus().is_none() {
        return;
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let start = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "ranks::process", "--ignored", "--nocapture", "--quiet"])
            .env(PROCESS, format!("{rank}@{address}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut said = [0, 1].map(start).map(|mut process| {
        let mut said = String::new();
        process.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        process.wait().unwrap();
        said
    });
    let first = std::mem::take(&mut said[0]);
    println!("{first}");
    for word in ["gathered 50000 with NCCL", "over tcp", "ERROR ", "rank 1, last seen", "was lost"]
    {
        assert!(first.contains(word), "no '{word}' in {first}");
    }
}

/// What a GPU's kernel cannot do over ranks is told when the runner is made.
#[test]
fn batched_rows_are_refused() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let options = Options { device: Some(Device::Cuda), kernel: None, ..options };
    let layer = moe_runner::weights::random_layer(&layers::plain(), FloatType::F32, 7).unwrap();
    let parallel = Parallel {
        sizes: sizes(1, 2, 1, true),
        row_format: RowFormat::Batched,
        ..Parallel::default()
    };
    let hidden = rows(F32, 3, layer.spec.dims.hidden, 1);
    let error = layers::split(&layer, &options, &parallel, &hidden).unwrap_err().to_string();
    assert!(error.contains("takes standard rows"), "{error}");
}
