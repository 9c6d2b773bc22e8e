//! Worlds of processes whose ranks are killed, stopped, cut off, or out of step: the others know who it was, and go on
//! without.

mod common;
#[path = "common/processes.rs"]
mod processes;

use std::net::Ipv4Addr;
use std::process::{Command, exit};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use common::{BF16, Case};
use processes::{
    DEADLINE, Event, Processes, Said, Start, config, is_over_rdma, killed, late, part, raise, say, well,
};
use railhop::bootstrap::{Bootstrap, BootstrapError, Store, StoreConfig};
use railhop::error::{Cause, Fault};
use railhop::fabric::rail::RdmaSysfs;
use railhop::{
    Combine, Communicator, Config, Error, Handle, Network, ProcessWorld, RecvBuffer, RowFormat, RowShape,
    Topology,
};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

/// No world takes longer: it hangs.
const LIMIT: Duration = Duration::from_secs(50);

/// Worlds at a time: most of them sleep.
const AT_A_TIME: usize = 3;

/// When the victim acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Moment {
    BeforeStore,
    BeforeJoin,
    /// After so many of the join's exchanges.
    InJoin(usize),
    /// Before so many of them, what precedes them being done.
    BeforeExchange(usize),
    Plan,
    Dispatch,
    Combine,
    /// When an operation of its own is over, and the next not begun.
    Between,
}

impl Moment {
    fn is_of_an_operation(self) -> bool {
        matches!(self, Self::Plan | Self::Dispatch | Self::Combine | Self::Between)
    }

    fn is_before_the_world(self) -> bool {
        !self.is_of_an_operation() && self != Self::InJoin(2)
    }
}

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Act {
    /// It is killed.
    Kill,
    /// It is stopped, and goes on when the others have ended.
    Stop,
    /// Its node's network fails.
    Cut,
    /// It leaves without a word to the others.
    Exit,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Failure {
    nodes: usize,
    ranks_per_node: usize,
    victim: usize,
    moment: Moment,
    act: Act,
}

/// What a process is to do.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Part {
    Fails(Failure),
    /// Rank 3 starts something else than the others.
    Differs(Difference),
    /// Rank 2 stops longer than the deadline, so many times, and all reset.
    Resets(usize),
    /// Rank 2 can't join as it is.
    Misfits(Misfit),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Difference {
    Hidden,
    /// A combine while the others dispatch.
    Lane,
    /// The order of a dispatch and a combine.
    Epoch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Misfit {
    Configuration,
    /// An interface that is no address of this machine.
    Interface,
}

#[test]
#[ignore = "what the processes do that other tests start"]
fn a_rank_of_its_own() {
    match part() {
        Part::Fails(failure) => Survivor::new(failure).run(),
        Part::Differs(difference) => differ(difference),
        Part::Resets(times) => reset(times),
        Part::Misfits(misfit) => misfit_joins(misfit),
    }
}

/// Rows enough for an operation to take a while.
const LARGE: RowShape = RowShape { hidden: 512, topk: 4, format: RowFormat::Bf16 };
const TOKENS: usize = 3000;

/// Passes on what it is asked, and lets the victim act in between.
struct Watched<'a> {
    store: Store,
    survivor: &'a Survivor,
    exchanges: usize,
}

impl Bootstrap for Watched<'_> {
    fn rank(&self) -> usize {
        self.store.rank()
    }

    fn world_size(&self) -> usize {
        self.store.world_size()
    }

    fn own_address(&self) -> Option<std::net::IpAddr> {
        self.store.own_address()
    }

    fn all_gather(&mut self, mine: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>, BootstrapError> {
        self.exchanges += 1;
        self.survivor.at(Moment::BeforeExchange(self.exchanges));
        let all = self.store.all_gather(mine, deadline);
        self.survivor.at(Moment::InJoin(self.exchanges));
        all
    }
}

/// A rank of a world in which another fails; or that one.
struct Survivor {
    failure: Failure,
    rank: usize,
    store: StoreConfig,
}

impl Survivor {
    fn new(failure: Failure) -> Self {
        let store = processes::store_config();
        Self { failure, rank: store.rank, store }
    }

    fn run(&self) {
        // It takes a while to make, which ranks that are in the world already might take for a fault.
        let large = Case::regular(&config(self.failure.nodes, self.failure.ranks_per_node), LARGE, TOKENS);
        let Some(mut comm) = self.join() else { return };
        say(self.rank, Event::Joined);
        if self.failure.moment.is_of_an_operation() {
            Case::random(comm.config(), BF16, 64, 7).round_trip(&mut comm);
        }
        let error = self.until_it_fails(&mut comm, &large);
        say(self.rank, event(error));
        if self.survivors().contains(&self.rank) {
            go_on(&mut comm, &self.survivors());
        }
    }

    /// Those that can go on together.
    fn survivors(&self) -> Vec<usize> {
        (0..self.failure.world_size()).filter(|&rank| !self.failure.is_lost(rank)).collect()
    }

    /// None if it has been said that it can't.
    fn join(&self) -> Option<Communicator> {
        self.at(Moment::BeforeStore);
        let begun = Instant::now();
        let not_joined = |begun: Instant, error: String| {
            say(self.rank, Event::NotJoined { error, after: begun.elapsed() });
        };
        // Processes start when the machine has time for them, unless it is about this deadline.
        let deadline = if self.failure.moment == Moment::BeforeStore { DEADLINE } else { 10 * DEADLINE };
        let store = Store::connect(&StoreConfig { deadline, ..self.store.clone() });
        let store = store.map_err(|error| not_joined(begun, format!("{error:?}"))).ok()?;
        self.at(Moment::BeforeJoin);
        let begun = Instant::now();
        let mut store = Watched { store, survivor: self, exchanges: 0 };
        let config = config(self.failure.nodes, self.failure.ranks_per_node);
        ProcessWorld::join(&mut store, config).map_err(|error| not_joined(begun, format!("{error:?}"))).ok()
    }

    /// Operations without end, but for the victim's.
    fn until_it_fails(&self, comm: &mut Communicator, case: &Case) -> Error {
        loop {
            if let Err(error) = self.operate(comm, case) {
                return error;
            }
        }
    }

    fn operate(&self, comm: &mut Communicator, case: &Case) -> Result<(), Error> {
        self.at(Moment::Plan);
        let handle = comm.plan(case.routing(self.rank))?;
        let buffer = comm.recv_buffer(handle.num_recv_tokens(), case.shape)?;
        let dispatch = comm.start_dispatch(&handle, case.x(self.rank), buffer);
        self.during(Moment::Dispatch, || dispatch.is_done());
        let received = dispatch.wait()?.buffer;
        self.at(Moment::Between);
        let y: RecvBuffer = case.experts(comm, &received);
        let combine = comm.start_combine(&handle, Combine::new(y));
        self.during(Moment::Combine, || combine.is_done());
        combine.wait()?;
        Ok(())
    }

    /// The victim's moment, if it is now.
    fn at(&self, moment: Moment) {
        if self.failure.victim == self.rank && self.failure.moment == moment {
            self.act(false);
        }
    }

    /// The victim's moment, if it is while an operation is under way that has begun to move.
    fn during(&self, moment: Moment, is_done: impl Fn() -> bool) {
        if self.failure.victim == self.rank && self.failure.moment == moment {
            thread::sleep(Duration::from_millis(3));
            if !is_done() {
                self.act(true);
            }
        }
    }

    fn act(&self, under_way: bool) {
        say(self.rank, Event::Acts { under_way });
        match self.failure.act {
            Act::Kill => raise(Signal::KILL),
            Act::Stop => raise(Signal::STOP),
            Act::Exit => exit(0),
            Act::Cut => set_link(&link_of(self.failure.node(self.rank)), "down"),
        }
    }
}

fn event(error: Error) -> Event {
    match error {
        Error::Fault(fault) => Event::Fault((*fault).clone()),
        error => Event::Refused(format!("{error:?}")),
    }
}

/// The `survivors` build a world of their own and work in it.
fn go_on(comm: &mut Communicator, survivors: &[usize]) {
    let mut group = comm.group(survivors).unwrap();
    // Among neighbours, or over rails.
    let config = if survivors.contains(&0) { config(1, survivors.len()) } else { config(survivors.len(), 1) };
    let mut small = ProcessWorld::join(&mut group, config.clone()).unwrap();
    for seed in 0..3 {
        Case::random(&config, BF16, 128, seed).round_trip(&mut small);
    }
    say(comm.rank(), Event::Worked(survivors.len()));
}

fn join_two_by_two() -> Communicator {
    ProcessWorld::join(&mut processes::store(), config(2, 2)).unwrap()
}

/// Starts a dispatch and a combine, in this order or the other; what they come to.
fn dispatch_and_combine(
    comm: &mut Communicator,
    case: &Case,
    handle: &Handle,
    reversed: bool,
) -> [Result<(), Error>; 2] {
    let rank = comm.rank();
    let rows = handle.num_recv_tokens();
    let buffer = comm.recv_buffer(rows, case.shape).unwrap();
    let mut y = comm.recv_buffer(rows, case.outputs()).unwrap();
    y.set_rows(rows);
    let (dispatched, combined) = if reversed {
        let combine = comm.start_combine(handle, Combine::new(y));
        (comm.start_dispatch(handle, case.x(rank), buffer).wait().map(drop), combine.wait().map(drop))
    } else {
        let dispatch = comm.start_dispatch(handle, case.x(rank), buffer);
        let combine = comm.start_combine(handle, Combine::new(y));
        (dispatch.wait().map(drop), combine.wait().map(drop))
    };
    [dispatched.map_err(Error::from), combined.map_err(Error::from)]
}

fn differ(difference: Difference) {
    let mut comm = join_two_by_two();
    let rank = comm.rank();
    let case = Case::regular(comm.config(), BF16, 64);
    let handle = comm.plan(case.routing(rank)).unwrap();
    let buffer = comm.recv_buffer(handle.num_recv_tokens(), case.shape).unwrap();
    drop(comm.dispatch(&handle, case.x(rank), buffer).unwrap());
    let differs = rank == 3;
    let shape = match difference {
        Difference::Hidden if differs => RowShape { hidden: 128, ..case.shape },
        _ => case.shape,
    };
    let other = Case::regular(comm.config(), shape, 64);
    let rows = handle.num_recv_tokens();
    let buffer = comm.recv_buffer(rows, shape).unwrap();
    let results = match difference {
        Difference::Epoch => dispatch_and_combine(&mut comm, &case, &handle, differs).to_vec(),
        Difference::Lane if differs => {
            let mut y = comm.recv_buffer(rows, case.outputs()).unwrap();
            y.set_rows(rows);
            vec![comm.combine(&handle, Combine::new(y)).map(drop).map_err(Error::from)]
        }
        _ => vec![comm.dispatch(&handle, other.x(rank), buffer).map(drop).map_err(Error::from)],
    };
    results.into_iter().for_each(|result| say(rank, event(result.unwrap_err())));
    if difference == Difference::Lane {
        comm.reset().unwrap();
    }
    case.round_trip(&mut comm);
    say(rank, Event::Worked(4));
}

fn reset(times: usize) {
    let large = Case::regular(&config(2, 2), LARGE, TOKENS);
    let mut comm = join_two_by_two();
    let rank = comm.rank();
    for time in 0..times {
        let handle = comm.plan(large.routing(rank)).unwrap();
        let buffer = comm.recv_buffer(handle.num_recv_tokens(), large.shape).unwrap();
        drop(comm.dispatch(&handle, large.x(rank), buffer).unwrap());
        loop {
            // Both lanes are full of rows when the rank stops.
            let buffer = comm.recv_buffer(handle.num_recv_tokens(), large.shape).unwrap();
            let mut y = comm.recv_buffer(handle.num_recv_tokens(), large.outputs()).unwrap();
            y.set_rows(handle.num_recv_tokens());
            let dispatch = comm.start_dispatch(&handle, large.x(rank), buffer);
            let combine = comm.start_combine(&handle, Combine::new(y));
            if rank == 2 {
                thread::sleep(Duration::from_millis(3));
                if !dispatch.is_done() && !combine.is_done() {
                    say(rank, Event::Acts { under_way: true });
                    raise(Signal::STOP);
                }
            }
            let results = [
                dispatch.wait().map(drop).map_err(Error::from),
                combine.wait().map(drop).map_err(Error::from),
            ];
            if let Some(error) = results.into_iter().find_map(Result::err) {
                say(rank, event(error));
                break;
            }
        }
        drop(handle);
        comm.reset().unwrap();
        for seed in 0..3 {
            Case::random(comm.config(), BF16, 128, 10 * time as u64 + seed).round_trip(&mut comm);
        }
        say(rank, Event::Worked(4));
    }
}

fn misfit_joins(misfit: Misfit) {
    let mut store = processes::store();
    let (rank, begun) = (store.rank(), Instant::now());
    let builder = Config::builder(Topology::new(2, 2).unwrap()).experts(8).deadline(DEADLINE);
    let config = match misfit {
        Misfit::Configuration if rank == 2 => builder.max_hidden(1024),
        Misfit::Interface if rank == 2 => {
            let interface = Some("192.0.2.77".parse().unwrap());
            builder.network(Network { interface, ..Network::default() })
        }
        _ => builder,
    };
    let error = ProcessWorld::join(&mut store, config.build().unwrap()).err().unwrap();
    say(rank, Event::NotJoined { error: format!("{error:?}"), after: begun.elapsed() });
}

/// A node with a network of its own, which is reached by a pair of links.
struct Namespace {
    name: String,
    host: Ipv4Addr,
}

/// The link's name on that node.
const LINK: &str = "rail";

/// What `node` is connected by, as its ranks call it.
fn link_of(node: usize) -> String {
    // Nodes that have devices are on one machine.
    if is_over_rdma() { format!("v{node}") } else { LINK.into() }
}

fn set_link(link: &str, state: &str) {
    assert!(Command::new("ip").args(["link", "set", link, state]).status().unwrap().success());
}

impl Namespace {
    fn new(number: u8) -> Self {
        let (id, third) = (std::process::id(), (std::process::id() % 200) as u8);
        let name = format!("railhop-{id}-{number}");
        let outer = format!("rh{}n{number}", id % 100_000);
        let namespace = Self { name: name.clone(), host: Ipv4Addr::new(10, 79, third, 4 * number + 1) };
        let inner = Ipv4Addr::new(10, 79, third, 4 * number + 2);
        for line in [
            format!("netns add {name}"),
            format!("link add {outer} type veth peer name {LINK} netns {name}"),
            format!("addr add {}/30 dev {outer}", namespace.host),
            format!("link set {outer} up"),
            format!("-n {name} addr add {inner}/30 dev {LINK}"),
            format!("-n {name} link set {LINK} up"),
            format!("-n {name} link set lo up"),
        ] {
            assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success(), "ip {line}");
        }
        namespace
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its end of the link goes with it, and so does the other.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// All that was said, and who has ended how.
struct Heard {
    said: Vec<Said>,
    ends: Vec<String>,
}

impl Failure {
    fn world_size(&self) -> usize {
        self.nodes * self.ranks_per_node
    }

    fn node(&self, rank: usize) -> usize {
        rank / self.ranks_per_node
    }

    /// Ranks that share the victim's fate.
    fn is_lost(&self, rank: usize) -> bool {
        match self.act {
            Act::Cut => self.node(rank) == self.node(self.victim),
            _ => rank == self.victim,
        }
    }

    /// Runs the world until all have ended; a stopped victim goes on when all others have.
    fn run(&self, processes: &mut Processes) -> Heard {
        let end = Instant::now() + LIMIT;
        let (mut said, mut ends) = (Vec::new(), vec![String::new(); self.world_size()]);
        let mut left = self.world_size();
        while left > 0 {
            let next = processes.hear(end);
            if let Event::Ended(how) = next.event {
                ends[next.rank] = how;
                left -= 1;
                if left == 1 && self.act == Act::Stop && ends[self.victim].is_empty() {
                    processes.signal(self.victim, Signal::CONT);
                }
                continue;
            }
            said.push(next);
        }
        Heard { said, ends }
    }

    fn test(&self, number: u8) {
        let namespace = (self.act == Act::Cut && !is_over_rdma()).then(|| Namespace::new(number));
        let name = |rank: usize| namespace.as_ref().filter(|_| self.is_lost(rank)).map(|ns| ns.name.clone());
        let host = namespace.as_ref().map_or(Ipv4Addr::LOCALHOST, |ns| ns.host);
        let part = Part::Fails(*self);
        let start = Start { world_size: self.world_size(), part: &part, host, namespace: &name };
        let mut processes = Processes::start(&start);
        let heard = self.run(&mut processes);
        if self.act == Act::Cut && is_over_rdma() {
            let node = self.node(self.victim);
            set_link(&link_of(node), "up");
            let (device, end) = (format!("rxe{node}"), Instant::now() + LIMIT);
            while !RdmaSysfs::default().is_active(&device, 1) {
                assert!(Instant::now() < end, "{device} is not active again");
                thread::sleep(Duration::from_millis(10));
            }
        }
        heard.check(self);
        assert_eq!(processes.leftovers(), Vec::<String>::new(), "{self:?}");
    }
}

impl Heard {
    fn check(&self, failure: &Failure) {
        let acted = self.said.iter().find(|said| matches!(said.event, Event::Acts { .. }));
        let acted =
            acted.unwrap_or_else(|| panic!("{failure:?}: the victim has not acted: {:#?}", self.said));
        for (rank, end) in self.ends.iter().enumerate() {
            let is_killed = rank == failure.victim && failure.act == Act::Kill;
            let expected = if is_killed { killed() } else { well() };
            assert_eq!(*end, expected, "{failure:?}, rank {rank}: {:#?}", self.said);
        }
        for rank in 0..failure.world_size() {
            let of_rank = self.said.iter().filter(|said| said.rank == rank);
            let mut of_rank =
                of_rank.filter(|said| !matches!(said.event, Event::Joined | Event::Acts { .. }));
            let survives = !failure.is_lost(rank);
            match (of_rank.next(), failure.moment.is_before_the_world()) {
                (None, _) if !survives => {}
                (Some(said), true) => check_not_joined(failure, said, survives),
                (Some(said), false) => {
                    check_fault(failure, acted, said, survives);
                    let worked = of_rank.next().map(|said| &said.event);
                    assert_eq!(
                        matches!(worked, Some(Event::Worked(_))),
                        survives,
                        "{failure:?}: {:#?}",
                        self.said
                    );
                }
                (None, _) => panic!("{failure:?}: rank {rank} has said nothing: {:#?}", self.said),
            }
        }
    }
}

fn check_not_joined(failure: &Failure, said: &Said, survives: bool) {
    let Event::NotJoined { error, after } = &said.event else {
        // Who has been stopped after all have joined may find itself in a world.
        return assert!(!survives, "{failure:?}: {said:#?}");
    };
    if !survives {
        return;
    }
    let lost: Vec<usize> = (0..failure.world_size()).filter(|&rank| failure.is_lost(rank)).collect();
    let alone = lost.iter().flat_map(|rank| {
        [
            format!("Lost {{ rank: {rank} }}"),
            format!("Missing {{ ranks: [{rank}]"),
            format!("Rank {{ rank: {rank},"),
        ]
    });
    let mut named = alone.chain([format!("Missing {{ ranks: {lost:?}")]);
    assert!(named.any(|named| error.contains(&named)), "{failure:?}: {said:?}");
    assert!(*after < DEADLINE + late(), "{failure:?}: {said:?}");
}

fn check_fault(failure: &Failure, acted: &Said, said: &Said, survives: bool) {
    let Event::Fault(fault) = &said.event else { panic!("{failure:?}: {said:#?}") };
    if !survives {
        return;
    }
    let Fault { rank, wait, cause, reporter, .. } = fault;
    // Who has lost its own link blames nobody else.
    let awaited = |peer| if matches!(cause, Cause::Link(_)) { rank == reporter } else { peer == *rank };
    assert!(failure.is_lost(*rank), "{failure:?}: {fault}");
    assert!(wait.is_some_and(|wait| awaited(wait.peer)), "{failure:?}: {fault}");
    let after = Duration::from_micros(said.at.saturating_sub(acted.at));
    assert!(after < DEADLINE + late(), "{failure:?}, rank {} after {after:?}: {fault}", said.rank);
}

/// Several worlds at a time.
fn all(failures: Vec<Failure>) {
    let failures = Mutex::new(failures.into_iter().enumerate());
    let work = || {
        loop {
            let Some((number, failure)) = failures.lock().unwrap().next() else { return };
            failure.test(number as u8);
        }
    };
    thread::scope(|scope| (0..AT_A_TIME).for_each(|_| drop(scope.spawn(work))));
}

const OPERATIONS: [Moment; 4] = [Moment::Plan, Moment::Dispatch, Moment::Combine, Moment::Between];

const WAY_IN: [Moment; 6] = [
    Moment::BeforeStore,
    Moment::BeforeJoin,
    Moment::BeforeExchange(1),
    Moment::InJoin(1),
    Moment::BeforeExchange(2),
    Moment::InJoin(2),
];

fn failures(moments: &[Moment], act: Act, victim: usize) -> Vec<Failure> {
    let of = |&moment| Failure { nodes: 2, ranks_per_node: 2, victim, moment, act };
    moments.iter().map(of).collect()
}

#[test]
fn a_rank_that_is_killed_is_named_and_done_without() {
    let mut all_of = failures(&OPERATIONS, Act::Kill, 3);
    all_of.extend(failures(&OPERATIONS[1..3], Act::Kill, 0));
    let shaped = |nodes, ranks_per_node| Failure { nodes, ranks_per_node, ..all_of[1] };
    all_of.extend([shaped(1, 4), shaped(4, 1)]);
    all(all_of);
}

#[test]
fn a_rank_that_is_stopped_is_named_and_done_without() {
    let mut all_of = failures(&OPERATIONS, Act::Stop, 2);
    all_of.extend(failures(&OPERATIONS[1..3], Act::Stop, 0));
    all(all_of);
}

#[test]
fn a_node_that_is_cut_off_is_named_and_done_without() {
    if !rustix::process::geteuid().is_root() {
        return println!("only root can cut off a node");
    }
    let mut all_of = failures(&OPERATIONS, Act::Cut, 3);
    if is_over_rdma() {
        // Its ranks meet by another network, and worlds share the device.
        return all_of.iter().for_each(|failure| failure.test(0));
    }
    all_of.extend(failures(&WAY_IN[..5], Act::Cut, 3));
    all(all_of);
}

#[test]
fn a_rank_that_does_not_get_into_the_world_is_named() {
    let mut all_of = failures(&WAY_IN[..5], Act::Kill, 2);
    all_of.extend(failures(&WAY_IN[..5], Act::Stop, 2));
    all(all_of);
}

#[test]
fn a_rank_that_ends_without_leaving_is_named() {
    all(failures(&[Moment::InJoin(2), Moment::Dispatch, Moment::Between], Act::Exit, 1));
}

/// Runs four ranks of `part`; what they say, by `hear` while they do.
fn four(part: Part, mut hear: impl FnMut(&Processes, &Said)) -> Vec<Said> {
    let mut processes = Processes::here(4, &part);
    let (mut said, mut left, end) = (Vec::new(), 4, Instant::now() + LIMIT);
    while left > 0 {
        let next = processes.hear(end);
        match &next.event {
            Event::Ended(how) => {
                assert_eq!(*how, well(), "{part:?}, rank {}: {said:#?}", next.rank);
                left -= 1;
            }
            _ => {
                hear(&processes, &next);
                said.push(next);
            }
        }
    }
    assert_eq!(processes.leftovers(), Vec::<String>::new(), "{part:?}");
    said
}

#[test]
fn ranks_out_of_step_are_named() {
    for difference in [Difference::Hidden, Difference::Lane, Difference::Epoch] {
        let said = four(Part::Differs(difference), |_, _| {});
        let count = |is: &dyn Fn(&Event) -> bool| said.iter().filter(|said| is(&said.event)).count();
        let out_of_step = |event: &Event| matches!(event, Event::Refused(error) if error.starts_with("OutOfStep { rank: 3,"));
        let (faults, refusals) = (
            count(&|event| matches!(event, Event::Fault(fault) if fault.rank == 3 && fault.wait.is_some())),
            count(&out_of_step),
        );
        let expected = match difference {
            Difference::Hidden => (0, 4),
            Difference::Lane => (4, 0),
            Difference::Epoch => (0, 8),
        };
        assert_eq!((faults, refusals), expected, "{difference:?}: {said:#?}");
        assert_eq!(count(&|event| matches!(event, Event::Worked(4))), 4, "{difference:?}: {said:#?}");
    }
}

#[test]
fn after_a_reset_nothing_of_before_it_appears() {
    let times = 3;
    let mut faults = 0;
    let said = four(Part::Resets(times), |processes, said| {
        if matches!(said.event, Event::Fault(_)) {
            faults += 1;
            if faults % 4 == 3 {
                processes.signal(2, Signal::CONT);
            }
        }
    });
    for said in &said {
        assert!(!matches!(&said.event, Event::Fault(fault) if fault.rank != 2), "{said:?}");
        assert!(!matches!(&said.event, Event::Refused(_)), "{said:?}");
    }
    let worked = said.iter().filter(|said| matches!(said.event, Event::Worked(4))).count();
    assert_eq!((worked, faults), (4 * times, 4 * times), "{said:#?}");
}

#[test]
fn who_cannot_join_as_it_is_is_named_to_all() {
    for (misfit, expected) in [
        (Misfit::Configuration, ["Mismatch { rank: 2,", "reference: 0,"]),
        (Misfit::Interface, ["Rank { rank: 2,", "192.0.2.77"]),
    ] {
        let said = four(Part::Misfits(misfit), |_, _| {});
        assert_eq!(said.len(), 4);
        for said in said {
            let Event::NotJoined { error, after } = &said.event else { panic!("{said:?}") };
            assert!(expected.iter().all(|part| error.contains(part)), "{misfit:?}: {error}");
            assert!(*after < DEADLINE, "{misfit:?}: {after:?}");
        }
    }
}
