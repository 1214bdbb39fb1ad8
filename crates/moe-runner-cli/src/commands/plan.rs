//! `plan`: what splitting a checkpoint's MoE layers over ranks would cost, before there are ranks.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use moe_runner::Error;
use moe_runner::checkpoint::architecture::LayerEntry;
use moe_runner::comm::{Communicator, Kind, Sizes, Traffic};
use moe_runner::exchange::{BetweenGpus, ExpertMap};
use moe_runner::experts::{Device, KERNELS, KernelDesc, cuda};
use moe_runner::hidden::ActivationDtype;
use moe_runner::oracle::{Machine, Request, select};
use moe_runner::parallel::balance::{
    Rebalanced, Topology, copies_beside, initial, rebalance_worth,
};
use moe_runner::parallel::cost::{Pass, bytes_of, weight_bytes_by};
use moe_runner::parallel::links::LinkSpeed;
use moe_runner::parallel::rebalance::transfers;
use moe_runner::parallel::{ExchangeKind, Parallel};
use moe_runner::random::Random;
use moe_runner::router::{LogicalId, Trace};
use moe_runner::spec::{LayerSpec, RouterSpec};
use moe_runner::weights::{Expert, LoadedLayer};
use serde::Serialize;

use crate::args::PlanArgs;
use crate::checkpoints::{Opened, ranges};
use crate::failure::{one_line, unusable};
use crate::gpu;
use crate::report::table::{Columns, Facts, Tone, toned};
use crate::report::{Report, units};
use crate::routing::load_trace;
use crate::splitting::Splitting;

/// Tokens of a random load, unless told.
const SYNTHETIC_TOKENS: usize = 1024;

/// Up to so many layers have a line each; more are summarised.
const IN_FULL: usize = 8;

/// More ranks than any deployment of one layer has.
const MAX_RANKS: usize = 1024;

#[derive(Serialize)]
pub(super) struct PlanJson {
    checkpoint: String,
    pub(super) ranks: usize,
    nodes: usize,
    /// Tokens that balance and traffic are counted for.
    pub(super) tokens: usize,
    /// "trace" or "synthetic".
    pub(super) load_from: &'static str,
    pub(super) layers: Vec<LayerJson>,
    /// What the ranks compute on, if not on processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpus: Option<GpusJson>,
    /// How fast the ranks reach each other, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<LinkJson>,
    splits: Vec<SplitJson>,
}

/// The ranks' GPUs.
#[derive(Clone, Serialize)]
struct GpusJson {
    machine: String,
    /// Of each, where there is one to ask.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_bytes: Option<u64>,
}

/// A link, and where it is known from.
#[derive(Clone, Serialize)]
struct LinkJson {
    #[serde(flatten)]
    speed: LinkSpeed,
    /// Ranks that it was measured between; `None`: given.
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<usize>,
    /// What connects them.
    #[serde(skip_serializing_if = "Option::is_none")]
    between: Option<&'static str>,
}

#[derive(Serialize)]
pub(super) struct LayerJson {
    pub(super) layer: usize,
    pub(super) experts: usize,
    pub(super) redundant: usize,
    experts_per_rank: usize,
    /// Copies on a rank that holds another one of the same expert.
    copies_beside: usize,
    /// What computes it on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<&'static str>,
    pub(super) balance_before: f64,
    pub(super) balance_after: f64,
    moved_experts: usize,
    pub(super) moved_bytes: usize,
    /// Slots that went to each expert: the load that is balanced.
    pub(super) load: Vec<usize>,
    /// Experts of each rank after balancing, in the order of its weights.
    placement: Vec<Vec<u32>>,
}

/// One way of splitting, over all the layers.
#[derive(Serialize)]
struct SplitJson {
    name: &'static str,
    flags: String,
    /// `None` where the split is refused.
    cost: Option<CostJson>,
    refused: Option<String>,
}

#[derive(Clone, Default, Serialize)]
struct CostJson {
    weight_bytes_min: usize,
    weight_bytes_max: usize,
    /// The weights are less than a GPU's memory, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    fits: Option<bool>,
    /// How rows go from GPU to GPU, where they stay on those.
    #[serde(skip_serializing_if = "Option::is_none")]
    between_gpus: Option<&'static str>,
    /// Bytes that all ranks together send, for one token through all the layers.
    sent_bytes_per_token: f64,
    /// Of that, by kind of collective.
    sent_by_collective: BTreeMap<&'static str, f64>,
    /// Bytes that the busiest rank sends or receives (the larger of the two) for the whole batch.
    busiest_rank_bytes: u64,
    collectives: u64,
    /// Seconds that the collectives take on the slowest rank, by the link: predicted.
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted_s: Option<f64>,
}

/// A layer with what its tokens choose.
struct Planned {
    layer: LoadedLayer,
    dtype: ActivationDtype,
    /// Of a GPU.
    kernel: Option<&'static KernelDesc>,
    /// `[tokens, k]`: the batch whose traffic is counted.
    ids: Vec<LogicalId>,
    balanced: Rebalanced,
}

/// Runs the command.
pub(crate) fn run(args: &PlanArgs) -> Result<Report> {
    let (links, reports) = links(args)?;
    if !reports {
        return Ok(Report::silent(true));
    }
    let json = plan_over(args, links)?;
    Report::new(true, text(&json), &json)
}

/// What is known of the way between the ranks.
#[derive(Clone, Default)]
struct Links {
    link: Option<LinkJson>,
    /// Rows stay on the ranks' GPUs; true: these write into each other's memory.
    gpus: Option<bool>,
}

/// The link between the ranks, given or measured; and whether this process reports.
fn links(args: &PlanArgs) -> Result<(Links, bool)> {
    let on_gpus = args.meeting.has_gpus() && args.device.gpu().is_some();
    // of one machine they are taken to, until they are asked
    let gpus = on_gpus.then_some(args.nodes == 1);
    if let Some(speed) = args.link {
        let link = Some(LinkJson { speed, measured: None, between: None });
        return Ok((Links { link, gpus }, true));
    }
    if !args.measure {
        return Ok((Links { link: None, gpus }, true));
    }
    check_sizes(args)?;
    let meeting = args.meeting.clone();
    let name = meeting.name();
    let ranks = Splitting::of_ranks(args.ranks, meeting).ranks(args.device.gpu().unwrap_or(0))?;
    // the way that rows would go
    let (speed, reach) = ranks.run(|groups| match on_gpus {
        true => measure_gpus(&*groups.world),
        false => Ok((LinkSpeed::measure(&*groups.world)?, false)),
    })?;
    let between = Some(if reach { "GPUs that write into each other's memory" } else { name });
    let link = Some(LinkJson { speed, measured: Some(args.ranks), between });
    Ok((Links { link, gpus: gpus.map(|_| reach) }, ranks.reports()))
}

#[cfg(feature = "cuda")]
fn measure_gpus(world: &dyn Communicator) -> moe_runner::Result<(LinkSpeed, bool)> {
    LinkSpeed::measure_gpus(world)
}

#[cfg(not(feature = "cuda"))]
fn measure_gpus(_: &dyn Communicator) -> moe_runner::Result<(LinkSpeed, bool)> {
    Err(Error::Device("this build was made without the feature 'cuda'".into()))
}

/// Plans the layers.
pub(super) fn plan(args: &PlanArgs) -> Result<PlanJson> {
    plan_over(args, Links::default())
}

fn check_sizes(args: &PlanArgs) -> Result<()> {
    let (ranks, nodes) = (args.ranks, args.nodes);
    if !(1..=MAX_RANKS).contains(&ranks) {
        return Err(unusable(format!("--ranks {ranks}: must be 1 to {MAX_RANKS}")));
    }
    if nodes == 0 || !ranks.is_multiple_of(nodes) {
        return Err(unusable(format!("--nodes {nodes}: must divide the {ranks} ranks")));
    }
    if args.tokens == Some(0) {
        return Err(unusable("--tokens 0: there must be at least one"));
    }
    Ok(())
}

fn plan_over(args: &PlanArgs, Links { link, gpus: reach }: Links) -> Result<PlanJson> {
    check_sizes(args)?;
    let (ranks, nodes) = (args.ranks, args.nodes);
    let on = gpus(args)?;
    let opened = Opened::open_outline(&args.of.checkpoint)?;
    let entries = opened.select(&args.of.layers)?;
    let trace = match args.trace.as_deref() {
        Some(path) => Some((path, load_trace(path, &entries)?)),
        None => None,
    };
    let mut planned = Vec::new();
    let mut layers = Vec::new();
    let machine = on.as_ref().map(|(machine, _)| machine);
    for entry in entries {
        let (layer, json) = plan_layer(&opened, entry, (args, machine), trace.as_ref())?;
        planned.push(layer);
        layers.push(json);
    }
    let tokens = planned.iter().map(|p| p.ids.len() / p.layer.spec.router.top_k).max();
    Ok(PlanJson {
        checkpoint: args.of.checkpoint.display().to_string(),
        ranks,
        nodes,
        tokens: tokens.unwrap_or(0),
        load_from: if trace.is_some() { "trace" } else { "synthetic" },
        splits: splits(ranks)
            .into_iter()
            .map(|split| {
                let speed = link.as_ref().map(|link| link.speed);
                let memory = on.as_ref().and_then(|(_, memory)| *memory);
                price(split, &planned, (speed, reach), memory)
            })
            .collect(),
        gpus: on.map(|(machine, memory_bytes)| GpusJson { machine: machine.name, memory_bytes }),
        link,
        layers,
    })
}

/// What the ranks' GPUs are, and the memory of one, where there is one.
fn gpus(args: &PlanArgs) -> Result<Option<(Machine, Option<u64>)>> {
    match (args.device.gpu(), &args.machine) {
        (None, None) => Ok(None),
        (None, Some(name)) => Err(unusable(format!("--machine {name}: needs --device cuda"))),
        (Some(_), Some(name)) => {
            let machine = Machine::named(name).map_err(|error| unusable(error.to_string()))?;
            Ok(Some((machine, None)))
        }
        (Some(index), None) => {
            let machine = Machine::detect().with_gpu(index).map_err(|error| match error {
                Error::Device(why) => Error::Device(format!("{why}; --machine sm90 plans for one")),
                other => other,
            })?;
            Ok(Some((machine, gpu::memory(index))))
        }
    }
}

fn plan_layer(
    opened: &Opened,
    entry: &LayerEntry,
    (args, machine): (&PlanArgs, Option<&Machine>),
    trace: Option<&(&Path, Trace)>,
) -> Result<(Planned, LayerJson)> {
    let layer = opened.load(entry)?;
    let (spec, router) = (&layer.spec, &layer.spec.router);
    let dtype = opened.dtype(args.dtype.named(), &layer);
    let kernel = match machine {
        None => None,
        Some(machine) => {
            let request = Request { device: Some(Device::Cuda), ..Request::of(&layer, dtype) };
            Some(select(KERNELS, &request, machine)?.kernel)
        }
    };
    let topology = topology(spec, args)?;
    let mut ids = match trace {
        Some((path, trace)) => recorded(spec, trace).map_err(|reason| Error::file(path, reason))?,
        None => skewed(
            router,
            args.tokens.unwrap_or(SYNTHETIC_TOKENS),
            args.seed.seed.wrapping_add(spec.index as u64),
        ),
    };
    ids.truncate(args.tokens.unwrap_or(usize::MAX).saturating_mul(router.top_k));
    let mut load = vec![0; router.experts];
    ids.iter().filter(|id| id.index() < router.experts).for_each(|id| load[id.index()] += 1);
    let weights: Vec<f64> = load.iter().map(|slots| *slots as f64).collect();
    let before = initial(router.experts, topology)?;
    // a copy beside another of its expert must buy as much time as it takes memory
    let balanced = rebalance_worth(&weights, &before, topology.groups, topology.nodes, 1.0)?;
    let moved = transfers(&before, &balanced.map)?;
    let bytes =
        moved.iter().map(|t| bytes_of(std::slice::from_ref(&layer.experts[t.expert.index()])));
    let json = LayerJson {
        layer: spec.index,
        experts: router.experts,
        redundant: topology.physical() - router.experts,
        experts_per_rank: topology.slots,
        copies_beside: copies_beside(&balanced.map),
        kernel: kernel.map(|kernel| kernel.name),
        balance_before: balanced.before,
        balance_after: balanced.after,
        moved_experts: moved.len(),
        moved_bytes: bytes.sum(),
        load,
        placement: (0..args.ranks)
            .map(|rank| balanced.map.held_by(rank).iter().map(|id| id.0).collect())
            .collect(),
    };
    Ok((Planned { layer, dtype, kernel, ids, balanced }, json))
}

/// The physical experts: as many redundant ones as were asked for, or as few as divide.
fn topology(spec: &LayerSpec, args: &PlanArgs) -> Result<Topology> {
    let experts = spec.router.experts;
    let least = experts.next_multiple_of(args.ranks) - experts;
    let redundant = args.redundant.unwrap_or(least);
    if redundant > experts.saturating_mul(args.ranks) - experts {
        return Err(unusable(format!(
            "--redundant {redundant}: every rank would hold all {experts} experts of layer {} and more",
            spec.index
        )));
    }
    let flat = Topology::flat(experts, redundant, args.ranks)
        .map_err(|error| unusable(format!("--redundant {redundant}: {error}")))?;
    let groups = spec.router.groups.map_or(1, |groups| groups.count);
    Ok(Topology { groups, nodes: args.nodes, ..flat })
}

/// What a trace recorded for a layer; or why it is of another model.
fn recorded(spec: &LayerSpec, trace: &Trace) -> Result<Vec<LogicalId>, String> {
    let Some(layer) = trace.layer(&spec.name) else {
        let names: Vec<&str> = trace.layers().iter().map(|layer| layer.name()).collect();
        let reason = format!("has no layer '{}'; it has {}", spec.name, names.join(", "));
        return Err(reason);
    };
    let router = &spec.router;
    if (layer.choices(), layer.top_k()) != (router.choices(), router.top_k) {
        let reason = format!(
            "layer '{}' was recorded with {} experts and top-{}; it has {} and top-{}",
            spec.name,
            layer.choices(),
            layer.top_k(),
            router.choices(),
            router.top_k
        );
        return Err(reason);
    }
    Ok(layer.ids().collect())
}

/// A load as uneven as measured ones: expert popularities spread log-normally (σ = 1), and every
/// token draws k different experts by them.
fn skewed(router: &RouterSpec, tokens: usize, seed: u64) -> Vec<LogicalId> {
    let random = &mut Random::new(seed);
    let popularity: Vec<f64> = (0..router.experts).map(|_| random.normal()).collect();
    let mut ids = Vec::new();
    for _ in 0..tokens {
        // the k largest of log-weights with Gumbel noise are a draw without replacement
        let mut keys: Vec<(f64, u32)> = popularity
            .iter()
            .zip(0..)
            .map(|(weight, id)| (weight - (-random.unit().ln()).ln(), id))
            .collect();
        keys.sort_by(|a, b| b.0.total_cmp(&a.0));
        let chosen = keys.iter().cycle().take(router.top_k);
        ids.extend(chosen.map(|(_, id)| LogicalId(*id)));
    }
    ids
}

/// The ways that an operator chooses among.
fn splits(ranks: usize) -> Vec<(&'static str, String, Parallel)> {
    let way = |name, flags: &str, tp, dp, expert_parallel, exchange| {
        let sizes = Sizes { tp, dp, expert_parallel, ..Sizes::default() };
        (
            name,
            flags.replace('N', &ranks.to_string()),
            Parallel { sizes, exchange, ..Parallel::default() },
        )
    };
    use ExchangeKind::{Auto, Naive};
    vec![
        way("TP", "--tp N", ranks, 1, false, Auto),
        way("EP", "--tp N --ep", ranks, 1, true, Auto),
        way("EP, naive", "--tp N --ep --exchange naive", ranks, 1, true, Naive),
        way("DP", "--dp N", 1, ranks, false, Auto),
        way("DP + EP", "--dp N --ep", 1, ranks, true, Auto),
        way("DP + EP, naive", "--dp N --ep --exchange naive", 1, ranks, true, Naive),
    ]
}

fn price(
    (name, flags, parallel): (&'static str, String, Parallel),
    layers: &[Planned],
    link: (Option<LinkSpeed>, Option<bool>),
    memory: Option<u64>,
) -> SplitJson {
    match cost(&parallel, layers, link, memory) {
        Ok(cost) => SplitJson { name, flags, cost: Some(cost), refused: None },
        Err(error) => SplitJson { name, flags, cost: None, refused: Some(error.to_string()) },
    }
}

fn cost(
    parallel: &Parallel,
    layers: &[Planned],
    (link, reach): (Option<LinkSpeed>, Option<bool>),
    memory: Option<u64>,
) -> moe_runner::Result<CostJson> {
    let ranks = parallel.sizes.ranks();
    let mut weights = vec![0; ranks];
    let mut traffic = vec![Traffic::default(); ranks];
    let mut cost = CostJson::default();
    for Planned { layer, dtype, kernel, ids, balanced } in layers {
        let one = ExpertMap::one_rank(layer.experts.len());
        let map = if parallel.sizes.use_ep() { &balanced.map } else { &one };
        let held = |experts: &[Expert]| match kernel {
            None => bytes_of(experts),
            Some(kernel) => cuda::held_bytes(kernel, experts),
        };
        let bytes = weight_bytes_by(held, layer, parallel, map)?;
        weights.iter_mut().zip(bytes).for_each(|(sum, bytes)| *sum += bytes.routed + bytes.shared);
        let mut pass = Pass::new(layer, *dtype, parallel, map)?;
        if let (Some(kernel), Some(reach)) = (kernel, reach)
            && let Some(way) = parallel.between_gpus(&layer.spec, reach)?
        {
            pass = pass.on_gpus(Pass::gpu_wire(layer, *dtype, kernel), way);
            cost.between_gpus = Some(way.name());
        }
        let tokens = (ids.len() / layer.spec.router.top_k).max(1) as f64;
        for (rank, counts) in pass.traffic(ids).into_iter().enumerate() {
            for kind in Kind::ALL.iter().filter(|kind| counts.of(**kind).sent > 0) {
                let per_token = counts.of(*kind).sent as f64 / tokens;
                *cost.sent_by_collective.entry(kind.name()).or_default() += per_token;
                cost.sent_bytes_per_token += per_token;
            }
            traffic[rank] = traffic[rank].plus(&counts);
        }
    }
    cost.predicted_s =
        link.map(|link| traffic.iter().map(|traffic| link.seconds(traffic)).fold(0.0, f64::max));
    let totals = traffic.iter().map(|traffic| traffic.total());
    cost.busiest_rank_bytes =
        totals.clone().map(|total| total.sent.max(total.received)).max().unwrap_or(0);
    cost.collectives = totals.map(|total| total.calls).max().unwrap_or(0);
    cost.weight_bytes_min = weights.iter().copied().min().unwrap_or(0);
    cost.weight_bytes_max = weights.iter().copied().max().unwrap_or(0);
    cost.fits = memory.map(|memory| (cost.weight_bytes_max as u64) < memory);
    Ok(cost)
}

/// Many layers of one shape stand together; few stand alone.
fn groups(layers: &[LayerJson]) -> Vec<Vec<&LayerJson>> {
    let shape = |layer: &LayerJson| (layer.experts, layer.redundant, layer.experts_per_rank);
    let mut groups: Vec<Vec<&LayerJson>> = Vec::new();
    for layer in layers {
        let alike = |group: &&mut Vec<&LayerJson>| shape(group[0]) == shape(layer);
        match groups.iter_mut().find(alike).filter(|_| layers.len() > IN_FULL) {
            Some(group) => group.push(layer),
            None => groups.push(vec![layer]),
        }
    }
    groups
}

/// "3.1 GB to 3.4 GB", and whether that is too much.
fn weights(cost: &CostJson) -> String {
    let bytes = [cost.weight_bytes_min, cost.weight_bytes_max].map(units::bytes);
    let mut cell = match bytes {
        [least, most] if least == most => most,
        [least, most] => format!("{least} to {most}"),
    };
    if cost.fits == Some(false) {
        cell += ", too much";
    }
    cell
}

fn text(json: &PlanJson) -> String {
    let mut out = format!("{}\n\n", toned(Tone::Title, &one_line(&json.checkpoint)));
    let mut facts = Facts::new();
    facts.add("ranks", format!("{} on {}", json.ranks, units::plural(json.nodes, "node")));
    facts.add(
        "load",
        match json.load_from {
            "trace" => "as recorded in the trace".to_owned(),
            _ => "synthetic: popularity of experts spread log-normally (--trace takes a real one)"
                .to_owned(),
        },
    );
    facts.add("counted for", units::plural(json.tokens, "token"));
    if let Some(GpusJson { machine, memory_bytes }) = &json.gpus {
        let mut kernels: BTreeMap<&str, usize> = BTreeMap::new();
        for kernel in json.layers.iter().filter_map(|layer| layer.kernel) {
            *kernels.entry(kernel).or_default() += 1;
        }
        let memory = memory_bytes.map(|bytes| format!(", {} each", units::bytes(bytes as usize)));
        facts.add("GPUs", format!("of {machine}{}", memory.unwrap_or_default()));
        for (kernel, layers) in kernels {
            facts.add("kernel", format!("{kernel} for {}", units::plural(layers, "layer")));
        }
    }
    if let Some(LinkJson { speed, measured, between }) = &json.link {
        let known = match (measured, between) {
            (Some(ranks), Some(between)) => format!("measured now, {ranks} ranks over {between}"),
            _ => "given: times are predictions, not measured here".to_owned(),
        };
        let LinkSpeed { latency_us, gbps } = speed;
        facts.add("links", format!("{gbps:.1} GB/s a rank, {latency_us:.1} us ({known})"));
    }
    let costs = json.splits.iter().filter_map(|split| split.cost.as_ref());
    if let Some(way) = costs.filter_map(|cost| cost.between_gpus).next() {
        let measured = json.link.as_ref().is_some_and(|link| link.measured.is_some());
        let known = match (way == BetweenGpus::OneSided.name(), measured) {
            (true, true) => "one-sided: they write into each other's memory",
            (true, false) => {
                "one-sided, if they reach each other's memory, as of one machine they mostly do"
            }
            (false, _) => "by NCCL, counts first",
        };
        facts.add("between GPUs", known);
    }
    let beside: usize = json.layers.iter().map(|layer| layer.copies_beside).sum();
    if beside > 0 {
        let what = "beside another of their expert on the same rank: the balance is worth it";
        facts.add("copies", format!("{beside} {what}"));
    }
    out += &facts.to_string();

    out += &format!(
        "\n{}\n",
        toned(Tone::Title, "balance of the experts over ranks (mean / largest load)")
    );
    let mut table = Columns::new(&[
        ">layer",
        ">experts",
        ">copies",
        ">a rank",
        ">before",
        ">after",
        ">moved",
        ">bytes moved",
    ]);
    for group in groups(&json.layers) {
        let indices: Vec<usize> = group.iter().map(|layer| layer.layer).collect();
        let span = |of: fn(&LayerJson) -> f64| {
            let values = || group.iter().map(|layer| of(layer));
            let (least, most) = (values().fold(1.0, f64::min), values().fold(0.0, f64::max));
            match format!("{least:.3}") == format!("{most:.3}") {
                true => format!("{most:.3}"),
                false => format!("{least:.3} to {most:.3}"),
            }
        };
        table.row([
            ranges(&indices),
            group[0].experts.to_string(),
            group[0].redundant.to_string(),
            group[0].experts_per_rank.to_string(),
            span(|layer| layer.balance_before),
            span(|layer| layer.balance_after),
            group.iter().map(|layer| layer.moved_experts).sum::<usize>().to_string(),
            units::bytes(group.iter().map(|layer| layer.moved_bytes).sum()),
        ]);
    }
    out += &table.to_string();
    if let [layer] = &json.layers[..] {
        out += &format!("\n{}\n", toned(Tone::Title, "placement"));
        let mut table = Columns::new(&[">rank", "experts"]);
        for (rank, experts) in layer.placement.iter().enumerate() {
            let experts: Vec<String> = experts.iter().map(ToString::to_string).collect();
            table.row([rank.to_string(), experts.join(" ")]);
        }
        out += &table.to_string();
    }

    let noun = units::plural(json.layers.len(), "layer");
    out += &format!("\n{}\n", toned(Tone::Title, &format!("ways to split {noun}, balanced")));
    let mut columns = vec![
        "split",
        "flags of run",
        ">weights a rank",
        ">sent a token",
        ">busiest rank",
        ">collectives",
    ];
    if json.link.is_some() {
        columns.push(">they take");
    }
    let mut table = Columns::new(&columns);
    for split in &json.splits {
        match &split.cost {
            None => table.row([split.name.to_owned(), split.flags.clone(), "refused".to_owned()]),
            Some(cost) => {
                let cells = [
                    split.name.to_owned(),
                    split.flags.clone(),
                    weights(cost),
                    units::bytes(cost.sent_bytes_per_token.round() as usize),
                    units::bytes(cost.busiest_rank_bytes as usize),
                    cost.collectives.to_string(),
                ];
                table.row(cells.into_iter().chain(cost.predicted_s.map(units::seconds)));
            }
        }
    }
    out += &table.to_string();
    for split in &json.splits {
        if let Some(reason) = &split.refused {
            out += &format!("{}: {}\n", split.name, one_line(reason));
        }
    }
    if json.link.is_some() {
        out += "\nthey take: the collectives on the busiest rank, predicted from latency and rate of the links; \
                experts and what overlaps are not in it.";
    }
    out + "\nsent a token: bytes that all ranks together send for one token; busiest rank: what one \
           sends or receives at most for all of them. \
           `run --placement FILE` takes what `plan --json` writes."
}
