//! Worlds that meet over real sockets, among strangers, latecomers and ranks that die.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use railhop::bootstrap::{
    Address, Agreed, Bootstrap, BootstrapError, Callback, JobKey, Launcher, Local, LocalBootstrap,
    MAX_GATHER, Member, Operation, Refusal, Step, Store, StoreConfig, VERSION,
};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// For what must succeed: as long as a loaded machine may need.
const LONG: Duration = Duration::from_secs(30);

/// For what is to expire.
const SHORT: Duration = Duration::from_millis(1500);

/// How much later than its deadline a rank may learn who is missing.
const LATE: Duration = Duration::from_secs(1);

/// Runs `test`, but no longer than a minute.
fn watched(test: impl FnOnce() + Send + 'static) {
    let (done, result) = channel();
    let runner = thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    match result.recv_timeout(Duration::from_secs(60)) {
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("the test hangs"),
        _ => runner.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

/// A port that nobody has and that the system does not give to outgoing connections, for what must be closed first.
fn quiet_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() % 90) as u16 * 100;
    loop {
        let port = 10_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % 9_000;
        if TcpListener::bind((V4, port)).is_ok() {
            return port;
        }
    }
}

fn config(world_size: usize, rank: usize, at: SocketAddr) -> StoreConfig {
    StoreConfig {
        rank,
        world_size,
        address: Address { host: at.ip().to_string(), port: at.port() },
        interface: None,
        is_remote: false,
        key: JobKey::new(Some(b"secret"), "job"),
        layout: 42,
        version: VERSION,
        deadline: LONG,
    }
}

fn listener(ip: IpAddr) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((ip, 0)).unwrap();
    let at = listener.local_addr().unwrap();
    (listener, at)
}

/// Runs `work` in a thread.
fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::spawn(work)
}

fn join<T>(ranks: Vec<JoinHandle<T>>) -> Vec<T> {
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

type Connected = Result<Store, BootstrapError>;

/// Ranks that connect, each with `change` made to its configuration; rank 0 on a port of the system's choice.
fn connecting(
    ip: IpAddr,
    world_size: usize,
    ranks: impl IntoIterator<Item = usize>,
    change: impl Fn(&mut StoreConfig),
) -> (SocketAddr, Vec<JoinHandle<Connected>>) {
    let (listener, at) = listener(ip);
    let mut listener = Some(listener);
    let connect = |rank| {
        let mut config = config(world_size, rank, at);
        change(&mut config);
        let listener = if rank == 0 { listener.take() } else { None };
        start(move || match listener {
            Some(listener) => Store::connect_with(&config, listener),
            None => Store::connect(&config),
        })
    };
    let handles = ranks.into_iter().map(connect).collect();
    (at, handles)
}

/// A world that has formed.
fn world(ip: IpAddr, size: usize) -> Vec<Store> {
    let (_, ranks) = connecting(ip, size, 0..size, |_| {});
    join(ranks).into_iter().map(Result::unwrap).collect()
}

/// Runs `work` on all ranks at once.
fn on_all<B: Bootstrap + 'static, T: Send + 'static>(
    ranks: Vec<B>,
    work: impl Fn(&mut B) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let run = |mut rank: B| {
        let work = work.clone();
        start(move || work(&mut rank))
    };
    join(ranks.into_iter().map(run).collect())
}

/// What `rank` brings to `round`: lengths differ, some are zero.
fn part(rank: usize, round: usize) -> Vec<u8> {
    vec![(16 * rank + round) as u8; (rank * 37 + round * 11) % 97 * (rank % 3)]
}

fn rounds<B: Bootstrap>(rank: &mut B) {
    for round in 0..12 {
        let parts = rank.all_gather(&part(rank.rank(), round), LONG).unwrap();
        let expected: Vec<_> = (0..rank.world_size()).map(|rank| part(rank, round)).collect();
        assert_eq!(parts, expected);
        if round % 3 == 0 {
            rank.barrier(LONG).unwrap();
        }
    }
}

#[test]
fn eight_ranks_gather_and_meet() {
    watched(|| drop(on_all(world(V4, 8), rounds)));
    watched(|| drop(on_all(LocalBootstrap::world(8), rounds)));
}

#[test]
fn ipv6_works_as_well() {
    if TcpListener::bind((V6, 0)).is_err() {
        return;
    }
    watched(|| drop(on_all(world(V6, 8), rounds)));
}

#[test]
fn one_rank_is_a_world() {
    watched(|| drop(on_all(world(V4, 1), rounds)));
    watched(|| drop(on_all(LocalBootstrap::world(1), rounds)));
}

#[test]
fn many_ranks_come_at_once() {
    watched(|| {
        for result in on_all(world(V4, 96), |rank| rank.all_gather(&rank.rank().to_le_bytes(), LONG)) {
            let parts = result.unwrap();
            assert!(parts.iter().enumerate().all(|(rank, part)| *part == rank.to_le_bytes()));
        }
    });
}

#[test]
fn the_callers_own_exchange_is_as_good() {
    watched(|| {
        let wrap = |mut inner: LocalBootstrap| {
            let (rank, size) = (inner.rank(), inner.world_size());
            Callback::new(rank, size, move |mine: &[u8]| inner.all_gather(mine, LONG))
        };
        drop(on_all(LocalBootstrap::world(4).into_iter().map(wrap).collect(), rounds));
    });
}

#[test]
fn the_server_may_be_late() {
    watched(|| {
        let at = SocketAddr::new(V4, quiet_port());
        let early: Vec<_> =
            (1..4).map(|rank| start(move || Store::connect(&config(4, rank, at)).unwrap())).collect();
        thread::sleep(Duration::from_millis(700));
        let mut ranks = vec![Store::connect(&config(4, 0, at)).unwrap()];
        assert_eq!(ranks[0].local_address(), Some(at));
        ranks.extend(join(early));
        drop(on_all(ranks, rounds));
    });
}

#[test]
fn without_a_server_ranks_say_where_they_looked() {
    watched(|| {
        let at = SocketAddr::new(V4, quiet_port());
        let begun = Instant::now();
        let error = Store::connect(&StoreConfig { deadline: SHORT, ..config(4, 2, at) }).unwrap_err();
        assert!(begun.elapsed() < SHORT + LATE);
        assert!(
            matches!(&error, BootstrapError::Unreachable { address, after: SHORT, .. } if *address == at.to_string()),
            "{error}"
        );
        let nowhere = Address { host: "no-such-host.invalid".into(), port: at.port() };
        let lost = StoreConfig { deadline: SHORT, address: nowhere, ..config(4, 2, at) };
        assert!(matches!(Store::connect(&lost), Err(BootstrapError::Unreachable { .. })));
        assert!(begun.elapsed() < 2 * (SHORT + LATE));
    });
}

#[test]
fn all_that_came_name_those_that_did_not() {
    watched(|| {
        let begun = Instant::now();
        let (_, ranks) = connecting(V4, 6, [0, 1, 3, 4], |config| config.deadline = SHORT);
        let step = Step { operation: Operation::Join, number: 0 };
        for result in join(ranks) {
            assert_eq!(
                result.unwrap_err(),
                BootstrapError::Missing { ranks: vec![2, 5], step, after: SHORT }
            );
        }
        assert!(begun.elapsed() >= SHORT && begun.elapsed() < SHORT + LATE, "{:?}", begun.elapsed());
    });
}

/// A rank, perhaps 0, stays away from a step; afterwards the world is over for all.
fn a_rank_stays_away<B: Bootstrap + 'static>(ranks: Vec<B>, absent: usize, number: u64) {
    let begun = Instant::now();
    let (gone, still) = channel::<()>();
    let work = {
        let still = std::sync::Arc::new(std::sync::Mutex::new(still));
        move |rank: &mut B| {
            if rank.rank() == absent {
                // Alive, but elsewhere.
                let _ = still.lock().unwrap().recv();
                return rank.barrier(LONG).unwrap_err();
            }
            let error = rank.barrier(SHORT).unwrap_err();
            assert!(begun.elapsed() < SHORT + LATE, "{:?}", begun.elapsed());
            assert_eq!(rank.all_gather(b"more", LONG).unwrap_err(), error);
            error
        }
    };
    let rank_threads: Vec<_> = ranks
        .into_iter()
        .map(|mut rank| {
            let work = work.clone();
            start(move || {
                let error = work(&mut rank);
                (error, rank)
            })
        })
        .collect();
    thread::sleep(SHORT + LATE);
    drop(gone);
    let step = Step { operation: Operation::Barrier, number };
    for (error, _) in join(rank_threads) {
        assert_eq!(error, BootstrapError::Missing { ranks: vec![absent], step, after: SHORT });
    }
}

#[test]
fn a_rank_that_stays_away_is_named_by_all_and_told_later() {
    watched(|| a_rank_stays_away(world(V4, 4), 3, 1));
    watched(|| a_rank_stays_away(world(V4, 4), 0, 1));
    watched(|| a_rank_stays_away(LocalBootstrap::world(4), 2, 0));
}

#[test]
fn who_does_not_know_the_secret_stays_out() {
    watched(|| {
        let (at, mut ranks) = connecting(V4, 3, [0, 1], |_| {});
        let strangers =
            [JobKey::new(Some(b"guess"), "job"), JobKey::new(Some(b"secret"), "older job")].map(|key| {
                let config = StoreConfig { key, ..config(3, 2, at) };
                start(move || Store::connect(&config).unwrap_err())
            });
        for stranger in strangers {
            let (by, why) = (at.to_string(), Refusal::Secret);
            assert_eq!(stranger.join().unwrap(), BootstrapError::Refused { by, why });
        }
        ranks.push(start(move || Store::connect(&config(3, 2, at))));
        drop(on_all(join(ranks).into_iter().map(Result::unwrap).collect(), rounds));
    });
}

#[test]
fn a_store_that_does_not_know_the_secret_is_not_believed() {
    watched(|| {
        let (listener, at) = listener(V4);
        // Knows how to talk, and answers every proof with a verdict of its own.
        let fake = start(move || {
            let mut heard = 0;
            while let Ok((mut stream, _)) = listener.accept() {
                let (mut greeting, mut proof) = ([0; 72], [0; 32]);
                if stream.read_exact(&mut greeting).is_err() {
                    return heard;
                }
                let _ = stream.write_all(&greeting);
                let _ = stream.read_exact(&mut proof);
                let _ = stream.write_all(&[&2u64.to_le_bytes()[..], &[0; 8], &proof].concat());
                heard += 1;
            }
            heard
        });
        let error = Store::connect(&config(2, 1, at)).unwrap_err();
        assert_eq!(error, BootstrapError::Refused { by: at.to_string(), why: Refusal::Secret });
        drop(TcpStream::connect(at));
        assert!(fake.join().unwrap() > 1);
    });
}

#[test]
fn something_else_in_the_stores_place_is_recognised() {
    watched(|| {
        let (listener, at) = listener(V4);
        let other = start(move || {
            for stream in listener.incoming() {
                let mut first = [0; 1];
                match stream.and_then(|mut stream| {
                    stream.read_exact(&mut first)?;
                    stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                }) {
                    Ok(()) => {}
                    Err(_) => return,
                }
            }
        });
        let error = Store::connect(&config(2, 1, at)).unwrap_err();
        assert_eq!(error, BootstrapError::Refused { by: at.to_string(), why: Refusal::NotAStore });
        drop(TcpStream::connect(at));
        other.join().unwrap();
    });
}

/// What strangers send.
fn garbage(at: SocketAddr, kind: usize) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(at).ok()?;
    let noise: Vec<u8> = (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let sent = match kind % 7 {
        // Closes at once.
        0 => return None,
        // Silent.
        1 => Ok(()),
        2 => stream.write_all(&noise),
        3 => stream.write_all(b"GET / HTTP/1.1\r\nHost: store\r\n\r\n"),
        // Half a greeting, then silence.
        4 => stream.write_all(&[&b"railhop1"[..], &[0; 20]].concat()),
        // A greeting and a proof of noise, with a frame of a huge length behind them.
        5 => stream.write_all(&[&b"railhop1"[..], &noise[..96], &[0xff; 64]].concat()),
        _ => stream.write_all(&[0xff; 80]),
    };
    sent.ok().map(|()| stream)
}

#[test]
fn strangers_disturb_nobody() {
    watched(|| {
        let (at, mut ranks) = connecting(V4, 6, 0..5, |_| {});
        // More silent ones than handshakes at a time.
        let mut strangers: Vec<_> = (0..280).filter_map(|kind| garbage(at, kind)).collect();
        ranks.push(start(move || Store::connect(&config(6, 5, at))));
        let world: Vec<_> = join(ranks).into_iter().map(Result::unwrap).collect();
        strangers.extend((0..21).filter_map(|kind| garbage(at, kind)));
        drop(on_all(world, rounds));
        drop(strangers);
    });
}

#[test]
fn a_rank_can_be_claimed_once() {
    watched(|| {
        let (at, mut ranks) = connecting(V4, 3, [0, 1], |_| {});
        // Rank 1 twice, and rank 0 by somebody who does not serve.
        thread::sleep(Duration::from_millis(300));
        let claim = move |rank| Store::connect(&config(3, rank, at)).unwrap_err();
        assert_eq!(claim(1), BootstrapError::Duplicate { rank: 1 });
        ranks.push(start(move || Store::connect(&config(3, 2, at))));
        let world: Vec<_> = join(ranks).into_iter().map(Result::unwrap).collect();
        // The same when the world has formed.
        assert_eq!(claim(2), BootstrapError::Duplicate { rank: 2 });
        drop(on_all(world, rounds));
    });
}

/// Ranks 0 and 1 fit, rank 2 has something else; what each of them gets.
fn misfits(what: Agreed, change: impl Fn(&mut StoreConfig), ours: u64, theirs: u64) {
    let (_, ranks) = connecting(V4, 3, 0..3, |config| {
        if config.rank == 2 {
            // A rank that comes after the end would find nobody to ask.
            thread::sleep(Duration::from_millis(300));
            change(config);
        }
    });
    let errors: Vec<_> = join(ranks).into_iter().map(Result::unwrap_err).collect();
    let seen_by_store = BootstrapError::Mismatch { rank: 0, peer: 2, what, ours, theirs };
    assert_eq!(errors[0], seen_by_store);
    assert_eq!(errors[1], seen_by_store);
    assert_eq!(errors[2], BootstrapError::Mismatch { rank: 2, peer: 0, what, ours: theirs, theirs: ours });
}

#[test]
fn what_does_not_fit_is_named_on_both_sides() {
    watched(|| {
        misfits(Agreed::Layout, |config| config.layout = 43, 42, 43);
        misfits(Agreed::Version, |config| config.version += 1, VERSION, VERSION + 1);
        misfits(Agreed::WorldSize, |config| config.world_size = 4, 3, 4);
    });
}

#[test]
fn a_misfit_does_not_disturb_a_world_that_has_formed() {
    watched(|| {
        let (at, ranks) = connecting(V4, 2, 0..2, |_| {});
        let world: Vec<_> = join(ranks).into_iter().map(Result::unwrap).collect();
        let (ours, theirs) = (8, 2);
        let error = Store::connect(&config(8, 7, at)).unwrap_err();
        assert_eq!(
            error,
            BootstrapError::Mismatch { rank: 7, peer: 0, what: Agreed::WorldSize, ours, theirs }
        );
        drop(on_all(world, rounds));
    });
}

/// Rank 2 leaves while others wait for rank 1, which comes when it is over.
fn a_rank_leaves<B: Bootstrap + 'static>(ranks: Vec<B>) {
    let begun = Instant::now();
    let work = move |mut rank: B| match rank.rank() {
        1 => {
            thread::sleep(Duration::from_millis(900));
            rank.all_gather(b"", LONG).unwrap_err()
        }
        2 => {
            thread::sleep(Duration::from_millis(200));
            BootstrapError::Lost { rank: 2 }
        }
        _ => rank.all_gather(&[7; 100], LONG).unwrap_err(),
    };
    let errors = join(ranks.into_iter().map(|rank| start(move || work(rank))).collect());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(errors, vec![BootstrapError::Lost { rank: 2 }; 4]);
}

#[test]
fn a_rank_that_leaves_is_named_at_once() {
    watched(|| a_rank_leaves(world(V4, 4)));
    watched(|| a_rank_leaves(LocalBootstrap::world(4)));
}

/// A process of these tests, which ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `a_rank_of_its_own` with nothing but `variables`, `NAME=value` words, in the environment.
fn process(variables: &str) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_rank_of_its_own", "--ignored", "--nocapture"]).env_clear();
    command.envs(variables.split_whitespace().filter_map(|word| word.split_once('=')));
    Process(command.stdout(Stdio::null()).spawn().unwrap())
}

#[test]
#[ignore = "what the processes do that other tests, or launchers, start"]
fn a_rank_of_its_own() {
    let member = Member::from_environment().unwrap();
    let mut store = Store::connect(&StoreConfig::of(&member, 42, LONG).unwrap()).unwrap();
    match std::env::var_os("RAILHOP_TEST_WAITS") {
        Some(_) => drop(store.all_gather(b"before its end", LONG)),
        None => rounds(&mut store),
    }
}

#[test]
fn a_process_that_is_killed_is_named_at_once() {
    watched(|| {
        let at = SocketAddr::new(V4, quiet_port());
        let open = move |rank| StoreConfig { key: JobKey::new(None, "killed"), ..config(4, rank, at) };
        let mut process = process(&format!(
            "RAILHOP_RANK=2 RAILHOP_WORLD_SIZE=4 RAILHOP_LOCAL_RANK=2 RAILHOP_LOCAL_SIZE=4 RAILHOP_STORE={at} \
             RAILHOP_JOB_ID=killed RAILHOP_TEST_WAITS=1"
        ));
        let ranks = [0, 1, 3].map(|rank| start(move || Store::connect(&open(rank)).unwrap()));
        let [first, mut absent, last] = ranks.map(|rank| rank.join().unwrap());
        let waiting =
            [first, last].map(|mut rank| start(move || (rank.all_gather(b"", LONG).unwrap_err(), rank)));
        // It has come to the gather as well, by now.
        thread::sleep(Duration::from_millis(500));
        let begun = Instant::now();
        process.0.kill().unwrap();
        // The store stays until the one that comes later has been told.
        let waited = waiting.map(|rank| rank.join().unwrap());
        assert!(begun.elapsed() < LATE, "{:?}", begun.elapsed());
        assert!(waited.iter().all(|(error, _)| *error == BootstrapError::Lost { rank: 2 }));
        assert_eq!(absent.barrier(LONG), Err(BootstrapError::Lost { rank: 2 }));
    });
}

#[test]
fn processes_meet_by_what_launchers_set() {
    watched(|| {
        let id = std::process::id();
        let launchers = [
            "RANK=% LOCAL_RANK=% WORLD_SIZE=4 LOCAL_WORLD_SIZE=4 MASTER_ADDR=localhost MASTER_PORT=#",
            "OMPI_COMM_WORLD_RANK=% OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=% \
             OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_NAMESPACE=#",
            "PMI_RANK=% PMI_SIZE=4 MPI_LOCALRANKID=% MPI_LOCALNRANKS=4 RAILHOP_JOB_ID=#",
            "SLURM_PROCID=% SLURM_LOCALID=% SLURM_NTASKS=4 SLURM_NODEID=0 SLURM_STEP_TASKS_PER_NODE=4 \
             SLURM_JOB_ID=# SLURM_STEP_ID=0 SLURM_STEP_NODELIST=n[0-3]",
        ];
        for launcher in launchers {
            let of_rank =
                |rank: usize| launcher.replace('%', &rank.to_string()).replace('#', &id.to_string());
            let processes: Vec<_> = (0..4).map(|rank| process(&of_rank(rank))).collect();
            for mut process in processes {
                assert!(process.0.wait().unwrap().success(), "{launcher}");
            }
        }
    });
}

#[test]
fn a_rank_that_dies_before_the_world_forms_is_named() {
    watched(|| {
        let (at, ranks) = connecting(V4, 4, [0, 1], |_| {});
        // A rank whose patience ends takes the others along; one that is killed has no time to say why.
        let impatient = StoreConfig { deadline: Duration::from_millis(300), ..config(4, 2, at) };
        let expected = start(move || Store::connect(&impatient).unwrap_err()).join().unwrap();
        assert!(matches!(&expected, BootstrapError::Missing { ranks, .. } if ranks.contains(&3)));
        for result in join(ranks) {
            assert_eq!(result.unwrap_err(), expected);
        }
    });
}

#[test]
fn ranks_that_lose_the_store_say_so() {
    watched(|| {
        let mut ranks = world(V4, 4);
        let store = ranks.remove(0);
        let waiting: Vec<_> = ranks
            .into_iter()
            .map(|mut rank| start(move || (rank.all_gather(b"x", LONG).unwrap_err(), rank.barrier(LONG))))
            .collect();
        thread::sleep(Duration::from_millis(200));
        drop(store);
        for (error, again) in join(waiting) {
            assert_eq!(error, BootstrapError::Lost { rank: 0 });
            assert_eq!(again, Err(error));
        }
    });
}

#[test]
fn a_store_that_ends_has_first_told_everybody() {
    watched(|| {
        for _ in 0..20 {
            // Each leaves as soon as it has met the others: the store goes first, as often as not.
            let parts = on_all(world(V4, 5), |rank| rank.all_gather(&vec![3; 200_000], LONG));
            assert!(parts.into_iter().all(|parts| parts.unwrap().iter().all(|part| part.len() == 200_000)));
        }
    });
}

fn up_to_the_limit<B: Bootstrap>(rank: &mut B) {
    let most = MAX_GATHER as usize;
    let bytes = if rank.rank() == 1 { vec![9; most - 2] } else { vec![8] };
    let parts = rank.all_gather(&bytes, LONG).unwrap();
    assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [1, most - 2, 1]);
    assert!(parts[1].iter().all(|&byte| byte == 9) && parts[2] == [8]);
    // One too many together, far too many alone; nothing is broken by it.
    for mine in [&bytes[..], &vec![0; if rank.rank() == 2 { most + 1 } else { 0 }]] {
        let mine = if rank.rank() == 0 && mine.len() == 1 { &[1, 2] } else { mine };
        let error = rank.all_gather(mine, LONG).unwrap_err();
        assert_eq!(error, BootstrapError::TooLarge { bytes: MAX_GATHER + 1, limit: MAX_GATHER });
    }
    assert_eq!(rank.all_gather(b"on", LONG).unwrap(), vec![b"on".to_vec(); 3]);
}

#[test]
fn gathers_hold_up_to_their_limit() {
    watched(|| drop(on_all(world(V4, 3), up_to_the_limit)));
    watched(|| drop(on_all(LocalBootstrap::world(3), up_to_the_limit)));
}

fn out_of_step<B: Bootstrap + 'static>(ranks: Vec<B>) {
    let errors = on_all(ranks, |rank| match rank.rank() {
        0 => {
            thread::sleep(Duration::from_millis(200));
            rank.barrier(LONG).unwrap_err()
        }
        _ => rank.all_gather(b"", LONG).unwrap_err(),
    });
    let expected = |peer| BootstrapError::Mismatch {
        rank: 0,
        peer,
        what: Agreed::Operation,
        ours: Operation::Barrier as u64,
        theirs: Operation::Gather as u64,
    };
    assert!((1..3).any(|peer| errors == vec![expected(peer); 3]), "{errors:?}");
    assert!(errors[0].to_string().starts_with("rank 0 has operation barrier, rank"));
}

#[test]
fn ranks_that_come_for_different_things_are_named() {
    watched(|| out_of_step(world(V4, 3)));
    watched(|| out_of_step(LocalBootstrap::world(3)));
}

#[test]
fn the_port_is_free_afterwards() {
    watched(|| {
        let at = SocketAddr::new(V4, quiet_port());
        // Worlds one after the other on one port, the last one a failure.
        for _ in 0..3 {
            let ranks = (0..3).map(|rank| start(move || Store::connect(&config(3, rank, at)).unwrap()));
            let ranks = join(ranks.collect());
            assert!(TcpListener::bind(at).is_err());
            drop(on_all(ranks, rounds));
            drop(TcpListener::bind(at).unwrap());
        }
        let alone = StoreConfig { deadline: Duration::from_millis(50), ..config(3, 0, at) };
        assert!(matches!(Store::connect(&alone), Err(BootstrapError::Missing { .. })));
        // A stranger that holds on does not hold the port.
        let store = start(move || Store::connect(&config(2, 0, at)));
        let other = Store::connect(&config(2, 1, at)).unwrap();
        let silent = TcpStream::connect(at).unwrap();
        let begun = Instant::now();
        drop((store.join().unwrap().unwrap(), other));
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        drop(TcpListener::bind(at).unwrap());
        drop(silent);
    });
}

#[test]
fn a_port_that_is_taken_is_an_error_and_says_what_to_set() {
    watched(|| {
        let at = SocketAddr::new(V4, quiet_port());
        let taken = TcpListener::bind(at).unwrap();
        let error = Store::connect(&config(2, 0, at)).unwrap_err();
        assert!(
            matches!(&error, BootstrapError::Io { reason, .. } if reason.contains("RAILHOP_STORE")),
            "{error}"
        );
        // One that is free soon is waited for.
        let store = start(move || Store::connect(&config(2, 0, at)));
        thread::sleep(Duration::from_millis(200));
        drop(taken);
        let rank = Store::connect(&config(2, 1, at)).unwrap();
        drop((store.join().unwrap().unwrap(), rank));
        // An address of another machine.
        let elsewhere = StoreConfig { interface: Some("192.0.2.77".parse().unwrap()), ..config(2, 0, at) };
        let error = Store::connect(&elsewhere).unwrap_err();
        assert!(
            matches!(&error, BootstrapError::Io { reason, .. } if reason.contains("RAILHOP_INTERFACE")),
            "{error}"
        );
    });
}

#[test]
#[cfg(target_os = "linux")]
fn only_the_configured_interface_is_bound() {
    watched(|| {
        let at: SocketAddr = ([127, 0, 0, 2], quiet_port()).into();
        // The store's address is not the one that is bound: another machine would see it translated, say.
        let translated = StoreConfig {
            interface: Some(at.ip().into()),
            address: Address { host: "203.0.113.9".into(), port: at.port() },
            ..config(2, 0, at)
        };
        let store = start(move || Store::connect(&translated).unwrap());
        let rank = Store::connect(&config(2, 1, at)).unwrap();
        let store = store.join().unwrap();
        assert_eq!(store.local_address(), Some(at));
        assert!(TcpStream::connect((V4, at.port())).is_err());
        drop((store, rank));
    });
}

/// Warnings of all tests of this process.
struct Warnings;

static WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = String::new();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            line += &format!("{field}={value:?} ");
        });
        WARNINGS.lock().unwrap().push(line);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn who_is_refused_is_logged_with_address_and_reason() {
    let _ = tracing::subscriber::set_global_default(Warnings);
    watched(|| {
        let (at, ranks) = connecting(V4, 2, [0], |_| {});
        let mut noise = TcpStream::connect(at).unwrap();
        noise.write_all(&[0; 100]).unwrap();
        let silent = TcpStream::connect(at).unwrap();
        let other = StoreConfig { key: JobKey::new(None, "other"), ..config(2, 1, at) };
        assert!(matches!(Store::connect(&other), Err(BootstrapError::Refused { .. })));
        let has = |peer: &str, why: &str| {
            let line = |line: &String| line.contains(peer) && line.contains(why);
            WARNINGS.lock().unwrap().iter().any(line)
        };
        let expected = [
            (format!("peer={} ", noise.local_addr().unwrap()), "not a store"),
            (format!("peer={} ", silent.local_addr().unwrap()), "timed out"),
            ("peer=127.0.0.1".into(), "the secret or the job id differs"),
        ];
        let begun = Instant::now();
        while !expected.iter().all(|(peer, why)| has(peer, why)) {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", WARNINGS.lock().unwrap());
            thread::sleep(Duration::from_millis(20));
        }
        drop((Store::connect(&config(2, 1, at)).unwrap(), join(ranks)));
    });
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let at = SocketAddr::new(V4, 1);
    for (rank, size, field) in [(2, 2, "rank"), (0, 0, "world_size"), (0, usize::MAX, "world_size")] {
        let error = Store::connect(&config(size, rank, at)).unwrap_err();
        assert!(matches!(&error, BootstrapError::Config(error) if error.field == field), "{error}");
    }
    let (listener, at) = listener(V4);
    assert!(matches!(Store::connect_with(&config(2, 1, at), listener), Err(BootstrapError::Config(_))));
}

#[test]
fn members_become_configurations() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secret");
    let member = Member {
        rank: 3,
        world_size: 8,
        local: Some(Local { rank: 1, size: 2 }),
        node: Some(1),
        store: "a:9".parse().unwrap(),
        interface: None,
        secret_file: Some(path.clone()),
        job_id: "7.1".into(),
        launcher: Launcher::Slurm,
    };
    let make = || StoreConfig::of(&member, 5, LONG);
    let blames_file = |result: Result<StoreConfig, BootstrapError>| {
        matches!(result, Err(BootstrapError::Environment { variable, value: Some(value), .. })
            if variable == "RAILHOP_SECRET_FILE" && value == path.display().to_string())
    };
    assert!(blames_file(make()));
    std::fs::write(&path, "").unwrap();
    assert!(blames_file(make()));
    std::fs::write(&path, vec![1; 70_000]).unwrap();
    assert!(blames_file(make()));
    std::fs::write(&path, "s3cret").unwrap();
    let config = make().unwrap();
    assert_eq!(config.key, JobKey::new(Some(b"s3cret"), "7.1"));
    assert_eq!((config.rank, config.world_size, config.layout, config.is_remote), (3, 8, 5, true));
    assert_eq!((config.address, config.version, config.deadline), (member.store.clone(), VERSION, LONG));
    let open = StoreConfig::of(
        &Member { secret_file: None, local: Some(Local { rank: 3, size: 8 }), ..member.clone() },
        5,
        LONG,
    )
    .unwrap();
    assert_eq!((open.key, open.is_remote), (JobKey::new(None, "7.1"), false));
}
