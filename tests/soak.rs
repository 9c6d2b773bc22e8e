//! Worlds of processes whose ranks are killed at random moments, one after the other, until two are left. `ci/soak` runs
//! it.

mod common;
#[path = "common/processes.rs"]
mod processes;

use std::collections::BTreeMap;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::{Case, Random};
use processes::{DEADLINE, Event, Processes, Said, config, killed, late, part, say, well};
use railhop::error::Fault;
use railhop::{Combine, Communicator, Config, Error, ProcessWorld, RowFormat, RowShape};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

/// Nothing that a world does between two kills takes longer: it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The longest time that a world works before one of its ranks is killed.
const LONGEST: usize = 150;

const SHAPES: [(usize, usize); 3] = [(1, 4), (2, 2), (4, 2)];

/// What a process is to do.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Part {
    nodes: usize,
    ranks_per_node: usize,
    seed: u64,
}

#[test]
#[ignore = "what the processes do that the soak starts"]
fn a_rank_of_its_own() {
    let Part { nodes, ranks_per_node, seed } = part();
    let config = config(nodes, ranks_per_node);
    let mut cases = cases(&config);
    let comm = ProcessWorld::join(&mut processes::store(), config).unwrap();
    let name = comm.rank();
    let mut member = Member { names: (0..comm.config().topology().world_size()).collect(), comm };
    loop {
        // Survivors of one fault have done different numbers of operations.
        let mut random = Random(seed ^ member.names.len() as u64);
        member.check(random.next());
        say(name, Event::Worked(member.names.len()));
        let Error::Fault(fault) = member.work(&cases, &mut random) else { panic!("ranks are in step") };
        // Named as the soak knows it.
        let victim = member.names[fault.rank];
        say(name, Event::Fault(Fault { rank: victim, ..(*fault).clone() }));
        if member.names.len() == 2 {
            return;
        }
        cases = member.go_on_without(fault.rank);
    }
}

/// What is moved. It takes a while to make, which ranks that are in a world already might take for a fault.
fn cases(config: &Config) -> [Case; 3] {
    let shape = RowShape { hidden: 512, topk: 4, format: RowFormat::Bf16 };
    [10, 200, 1000].map(|tokens| Case::regular(config, shape, tokens))
}

/// A rank of a world that becomes smaller.
struct Member {
    /// By place in the world: what the ranks were called at first.
    names: Vec<usize>,
    comm: Communicator,
}

impl Member {
    /// Everything is as the oracle says.
    fn check(&mut self, seed: u64) {
        let shape = RowShape { hidden: 64, topk: 4, format: RowFormat::Bf16 };
        Case::random(self.comm.config(), shape, 64, seed).round_trip(&mut self.comm);
    }

    /// Random operations without end.
    fn work(&mut self, cases: &[Case], random: &mut Random) -> Error {
        loop {
            let case = &cases[random.below(cases.len())];
            if let Err(error) = self.operate(case, random.below(4)) {
                return error;
            }
        }
    }

    fn operate(&mut self, case: &Case, what: usize) -> Result<(), Error> {
        let (rank, comm) = (self.comm.rank(), &mut self.comm);
        let handle = comm.plan(case.routing(rank))?;
        if what == 0 {
            return Ok(());
        }
        let rows = handle.num_recv_tokens();
        let buffer = comm.recv_buffer(rows, case.shape)?;
        let received = comm.dispatch(&handle, case.x(rank), buffer)?.buffer;
        if what == 1 {
            return Ok(());
        }
        let combine = comm.start_combine(&handle, Combine::new(received));
        if what == 3 {
            // Both lanes at a time.
            let buffer = comm.recv_buffer(rows, case.shape)?;
            comm.dispatch(&handle, case.x(rank), buffer)?;
        }
        combine.wait()?;
        Ok(())
    }

    fn go_on_without(&mut self, lost: usize) -> [Case; 3] {
        let survivors: Vec<_> = (0..self.names.len()).filter(|&rank| rank != lost).collect();
        let count = survivors.len();
        let config = if count % 2 == 0 { config(2, count / 2) } else { config(count, 1) };
        let cases = cases(&config);
        let mut group = self.comm.group(&survivors).unwrap();
        self.comm = ProcessWorld::join(&mut group, config).unwrap();
        self.names = survivors.into_iter().map(|rank| self.names[rank]).collect();
        cases
    }
}

#[derive(Default, Serialize)]
struct Report {
    date: String,
    command: String,
    seed: u64,
    kills: usize,
    /// By shape of the first world.
    kills_by_world: BTreeMap<String, usize>,
    /// From a kill to the error of the last survivor, in milliseconds.
    median_ms: f64,
    worst_ms: f64,
    deadline_ms: u64,
    /// Errors that name somebody else, or are no faults.
    false_blames: Vec<String>,
    /// Survivors whose error came later than a second after the deadline.
    late: Vec<String>,
    leftovers: Vec<String>,
    #[serde(skip)]
    times: Vec<f64>,
}

fn date() -> String {
    let date = Command::new("date").args(["-u", "+%F"]).output().unwrap().stdout;
    String::from_utf8(date).unwrap().trim().into()
}

#[test]
#[ignore = "takes a while: ci/soak runs it"]
fn ranks_are_killed_at_random_moments() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let (kills, seed) = (number("SOAK_KILLS", 200) as usize, number("SOAK_SEED", now));
    println!("{kills} kills, seed {seed}");
    let mut report = Report {
        date: date(),
        command: format!("ci/soak --kills {kills} --seed {seed}"),
        seed,
        deadline_ms: DEADLINE.as_millis() as u64,
        ..Report::default()
    };
    let mut random = Random(seed);
    for (nodes, ranks_per_node) in SHAPES.into_iter().cycle() {
        if report.kills == kills {
            break;
        }
        let part = Part { nodes, ranks_per_node, seed: random.next() };
        let before = report.kills;
        Soak::start(part).run(kills, &mut random, &mut report);
        *report.kills_by_world.entry(format!("{nodes}x{ranks_per_node}")).or_default() +=
            report.kills - before;
    }
    report.times.sort_by(f64::total_cmp);
    (report.median_ms, report.worst_ms) =
        (report.times[report.times.len() / 2], *report.times.last().unwrap());
    let json = serde_json::to_string_pretty(&report).unwrap();
    println!("{json}");
    if let Some(file) = std::env::var_os("SOAK_JSON") {
        std::fs::write(file, json + "\n").unwrap();
    }
    let bad = [&report.false_blames, &report.late, &report.leftovers];
    assert!(bad.iter().all(|lines| lines.is_empty()), "see above");
}

/// A world that loses its ranks one by one.
struct Soak {
    processes: Processes,
    alive: Vec<usize>,
    /// Processes that have not been waited for.
    left: usize,
}

impl Soak {
    fn start(part: Part) -> Self {
        let size = part.nodes * part.ranks_per_node;
        Self { processes: Processes::here(size, &part), alive: (0..size).collect(), left: size }
    }

    fn run(mut self, kills: usize, random: &mut Random, report: &mut Report) {
        while self.alive.len() > 1 && report.kills < kills {
            self.until_all_work(report);
            thread::sleep(Duration::from_millis(random.below(LONGEST) as u64));
            self.kill(random, report);
        }
        // The last survivors, if the soak ends here, are killed together.
        for rank in std::mem::take(&mut self.alive) {
            self.processes.signal(rank, Signal::KILL);
        }
        while self.left > 0 {
            self.hear();
        }
        report.leftovers.extend(self.processes.leftovers());
    }

    fn hear(&mut self) -> Said {
        let said = self.processes.hear(Instant::now() + LIMIT);
        self.left -= usize::from(matches!(said.event, Event::Ended(_)));
        said
    }

    fn until_all_work(&mut self, report: &Report) {
        let mut working = 0;
        while working < self.alive.len() {
            match self.hear() {
                Said { event: Event::Worked(size), .. } if size == self.alive.len() => working += 1,
                Said { event: Event::Ended(how), rank, .. } if self.alive.contains(&rank) => {
                    panic!("rank {rank}: {how}; {:#?}", report.false_blames)
                }
                _ => {}
            }
        }
        self.processes.look();
    }

    fn kill(&mut self, random: &mut Random, report: &mut Report) {
        let victim = self.alive.remove(random.below(self.alive.len()));
        let begun = processes::now();
        self.processes.signal(victim, Signal::KILL);
        report.kills += 1;
        let (mut told, mut worst) = (0, 0.0f64);
        while told < self.alive.len() {
            let said = self.hear();
            let after = said.at.saturating_sub(begun) as f64 / 1000.0;
            match &said.event {
                Event::Fault(fault) => {
                    told += 1;
                    worst = worst.max(after);
                    if fault.rank != victim || fault.wait.is_none() {
                        let told = format!(
                            "kill {} of {victim}, rank {} after {after} ms: {fault}",
                            report.kills, said.rank
                        );
                        report.false_blames.push(told);
                    }
                    if after > (DEADLINE + late()).as_secs_f64() * 1000.0 {
                        report.late.push(format!("rank {} after {after} ms: {fault}", said.rank));
                    }
                }
                Event::Ended(how) => assert!(
                    said.rank == victim && *how == killed() || *how == well(),
                    "rank {} when {victim} was killed: {how}",
                    said.rank
                ),
                _ => {}
            }
        }
        report.times.push(worst);
        if self.alive.len() == 1 {
            // It ends by itself.
            self.alive.clear();
        }
    }
}
